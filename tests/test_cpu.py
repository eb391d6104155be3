"""The kernels for CPUs against the float64 definitions, and what they promise whatever the threads."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from attention_cases import Case, random_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import problem_of_case, selection_of
from test_tail import means_of, tail_case
from test_torch_decode import KINDS, all_equal, clustered, codes_of, decode_case, denormals, heavy_tails, huge_norms
from test_torch_ops import ADVERSARIAL, TOLERANCE, revealing_case
from tiny_models import random_ids, tiny_model

from nc_patch import KeyIndex, patch_model, sparse_attention
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals
from nc_patch.selections import Block, Selection, TopK
from nc_patch.selections.block.pages import PageStatistics, page_count, update_pages_
from nc_patch.selections.topk.codes import KeyCodes

pytest.importorskip("numba")

SELECTIONS = ("topk", "drop", "window", "dense", "block")


def selection_for(name: str, case: Case) -> Selection:
    keys = {"sink_keys": case.sink_keys, "recent_keys": case.recent_keys}
    if name in ("topk", "drop"):
        return TopK(**keys, tail="mean" if name == "topk" else "drop")
    return selection_of(name, **case.block_settings(), **keys)


def case_for(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """A random case that suits a selection: blocks need more keys, and page means sequences."""
    if name == "topk":
        return tail_case(seed, dtype=dtype)
    return random_case(seed, dtype=dtype, longest=300 if name == "block" else 150)


def assert_equals(result: AttentionResult, expected: AttentionResult, dtype: torch.dtype, seed: int) -> None:
    assert result.output.dtype == dtype
    assert relative_error(result.output, expected.output) < TOLERANCE[dtype], seed
    if result.lse is not None and result.kept_mass is not None:
        assert torch.allclose(result.lse.double(), expected.lse, atol=1e-4), seed
        assert torch.allclose(result.kept_mass.double(), expected.kept_mass, atol=1e-5), seed
    if result.attended is not None:
        assert torch.equal(result.attended, expected.attended), seed


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_random_cases_equal_the_reference(name, dtype):
    for seed in range(40):
        case = case_for(name, seed, dtype)
        selection = selection_for(name, case)
        for stats in (True, False):
            problem = problem_of_case(case, stats=stats)
            assert_equals(selection.run(problem, "cpu"), selection.reference(problem), dtype, seed)


@pytest.mark.usefixtures("poisoned_memory")
@given(st.integers(1000, 10**9), st.sampled_from(SELECTIONS))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_more_random_cases(seed, name):
    case = case_for(name, seed)
    if name == "block":  # where a soft-cap saturates, float32 cannot tell blocks apart that float64 can
        case.softcap = 0.0
    selection, problem = selection_for(name, case), problem_of_case(case)
    assert_equals(selection.run(problem, "cpu"), selection.reference(problem), torch.float32, seed)


@pytest.mark.parametrize("selection", ["topk", "window"])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_the_rows_that_attend_them_and_no_number_is_wrong(selection, where, what):
    for seed in range(12):
        case = random_case(seed, longest=60)
        case.softcap = 0.0
        tensor = getattr(case, where)
        tensor[0, 0, tensor.shape[2] // 2, 0] = what
        chosen, problem = selection_for({"topk": "drop"}.get(selection, selection), case), problem_of_case(case)
        expected, output = chosen.reference(problem).output, chosen.run(problem, "cpu").output.double()
        assert not bool((output.isfinite() & ~expected.isfinite()).any()), seed
        if where == "key":
            assert torch.equal(output.isnan(), expected.isnan()), seed
        sound = output.isfinite()
        torch.testing.assert_close(output[sound], expected[sound], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_no_query_sees_is_not_read(name):
    for seed in range(12):
        case = case_for(name, seed)
        selection, problem = selection_for(name, case), problem_of_case(case)
        expected = selection.run(problem, "cpu").output
        seen = torch.zeros(case.key.shape[0], case.key.shape[2], dtype=torch.bool)
        for b, rows in enumerate(case.visible.tolist()):
            for start, end in rows:
                seen[b, start:end] = True
        hidden = ~seen[:, None, :, None]
        problem = problem._replace(
            key=problem.key.masked_fill(hidden, torch.nan), value=problem.value.masked_fill(hidden, torch.nan)
        )
        if name == "topk":
            problem = problem._replace(means=means_of(case))
        assert relative_error(selection.run(problem, "cpu").output, expected) < 1e-6, seed


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("queries", [3, 48])
def test_nan_in_padding_reaches_no_row(name, queries):
    query, key, value = (torch.randn(1, heads, 64, 16) for heads in (4, 2, 2))
    key[:, :, :16] = value[:, :, :16] = torch.nan
    visible = causal_intervals(1, 64, 64, "cpu").clamp(min=16)[:, -queries:].contiguous()
    options = {"alpha": 1.0, "C": 0.5, "visible": visible, "selection": "topk" if name == "drop" else name}
    options |= {"tail": name} if name == "drop" else {}
    found = []
    for padding in (torch.nan, 0.0):
        key[:, :, :16] = value[:, :, :16] = padding
        found.append(sparse_attention(query[:, :, -queries:], key, value, **options, backend="cpu"))
    assert bool(found[0].isfinite().all())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_sink_beyond_all_scores_leaves_the_statistics_right(name):
    case = case_for(name, 4)
    case.sinks = torch.full((case.query.shape[1],), 120.0)
    selection, problem = selection_for(name, case), problem_of_case(case, stats=True)
    assert_equals(selection.run(problem, "cpu"), selection.reference(problem), torch.float32, 4)


@pytest.mark.parametrize("bits", [-1, 0x7F800001, 0x7FC12345])
def test_a_nan_of_any_bits_stays_one(bits):
    query, key, value = (torch.randn(1, 2, 64, 16) for _ in range(3))
    key[0, 0, 10] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    options = {"alpha": 2.0, "C": 0.5, "tail": "drop"}
    found, expected = (sparse_attention(query, key, value, **options, backend=name) for name in ("cpu", "torch"))
    assert torch.equal(found.isnan(), expected.isnan())


def test_a_default_device_is_not_where_kernels_compute():
    tensors, visible = [torch.randn(1, 2, 40, 16) for _ in range(3)], causal_intervals(1, 40, 40, "cpu")
    with torch.device("meta"):
        for name in ("topk", "block", "window", "dense"):
            result = sparse_attention(
                *tensors, alpha=2.0, C=0.5, visible=visible, origin=visible[..., 0], selection=name
            )
            assert result.device.type == "cpu"
            assert bool(result.isfinite().all())


def test_few_rows_at_the_end_of_a_long_buffer_choose_blocks():
    n, rows = 400_000, 32
    query, key = torch.randn(1, 1, rows, 16), torch.randn(1, 1, n, 16)
    end = torch.arange(n - rows + 1, n + 1, dtype=torch.int32)
    visible = torch.stack((end - 128, end), -1)[None].contiguous()
    options = {
        "alpha": 2.0,
        "C": 0.5,
        "selection": "block",
        "visible": visible,
        "origin": visible[..., 0].clamp(max=n - 160),
    }
    found, expected = (sparse_attention(query, key, key, **options, backend=name) for name in ("cpu", "torch"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_sequence_is_no_fault():
    empty = torch.empty(0, 1, 3, 16)
    for name in ("topk", "block", "window", "dense"):
        assert sparse_attention(empty, empty, empty, alpha=1.0, C=0.5, selection=name).shape == empty.shape


def test_of_a_first_page_with_one_visible_key_only_that_counts():
    g = torch.Generator().manual_seed(0)
    key = 0.001 * torch.randn(1, 1, 320, 16, generator=g)
    key[:, :, :15] = 3 * torch.randn(1, 1, 15, 16, generator=g).abs()
    key[:, :, 15] = 0
    key[:, :, 200:216] += 0.02
    query, visible = torch.full((1, 1, 1, 16), 40.0), torch.tensor([[[15, 320]]], dtype=torch.int32)
    index = KeyIndex.build(key, "pages", block_size=16)
    options = {"alpha": 2.2, "C": 0.5, "selection": "block", "visible": visible, "index": index, "return_stats": True}
    found, expected = (sparse_attention(query, key, key, **options, backend=name) for name in ("cpu", "torch"))
    torch.testing.assert_close(found.kept_mass, expected.kept_mass)


def test_a_backend_by_name_leaves_dense_layers_to_train():
    model = patch_model(tiny_model("llama"), 1.0, 0.6, backend="cpu", dense_below=1024)
    model(random_ids(1, 40), labels=random_ids(1, 40)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("budget", [1, 2, 31, 63, 64, 99, 100])
@pytest.mark.parametrize("by_codes", [False, True])
def test_the_attended_set_is_exact_on_adversarial_keys(kind, budget, by_codes):
    keys = torch.nn.functional.pad(ADVERSARIAL[kind](100), (0, 12))
    case = revealing_case(keys, budget, sink_keys=2, recent_keys=1)
    case.scale = 1e-33 if kind == "huge" else 0.01
    selection, problem = selection_for("drop", case), problem_of_case(case)
    expected = selection.reference(problem).output > 0
    if by_codes:
        problem = problem._replace(key_index=tuple(codes_of(case)))
    many = problem._replace(
        query=problem.query.expand(1, 1, 6, -1), visible=problem.visible.expand(1, 6, 2).contiguous(),
        origin=problem.origin.expand(1, 6).contiguous(), budget=problem.budget.expand(1, 1, 6).contiguous(),
    )  # fmt: skip
    for each in (problem, many):
        assert torch.equal(
            selection.run(each, "cpu").output > 0, expected.expand_as(each.query[..., :1].expand(-1, -1, -1, 100))
        )


@given(st.integers(0, 10**6), st.integers(0, len(KINDS) - 1), st.integers(0, 5))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_codes_choose_the_references_keys(seed, kind, new):
    case = decode_case(seed)
    pad = -case.query.shape[-1] % 16 if seed % 3 else 0  # whole vectors of codes, or keys themselves
    case.query, case.key = (torch.nn.functional.pad(t, (0, pad)) for t in (case.query, case.key))
    if kind in (1, 5, 6):
        case.query = (case.query * 4).round()
    case.key = KINDS[kind](case.key)
    expected = case.reference("topk")
    codes = codes_of(case)
    new = min(new, case.query.shape[2], int((case.visible[:, -1, 1] - case.visible[:, 0, 0]).min()))
    for b, end in enumerate(case.visible[..., 1].amax(-1).tolist()):
        for part in codes[:3]:  # the new keys have no codes yet
            part[b, :, end - new : end] = 0
    room = -case.key.shape[2] % 16 + 16
    codes = KeyCodes(*(torch.nn.functional.pad(t, (*(0, 0) * (t.ndim - 3), 0, room)) for t in codes[:3]), *codes[3:])
    problem = problem_of_case(case, key_index=tuple(t.contiguous() for t in codes), new=new)
    output = TopK(case.sink_keys, case.recent_keys, "drop").run(problem, "cpu").output
    group = case.query.shape[1] // case.key.shape[1]
    logits = case.scale * case.query.double() @ case.key.double().repeat_interleave(group, 1).transpose(-1, -2)
    largest = float(logits.abs().max())
    assert relative_error(output, expected.output) < 1e-5 + (5e-7 * largest if largest < 1e5 else 0.0)


@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_decoding_with_page_means_equals_the_reference(seed):
    case = tail_case(seed)
    case.query, case.budget = case.query[:, :, -4:], case.budget[..., -4:].contiguous()
    case.visible, case.origin = case.visible[:, -4:].contiguous(), case.origin[:, -4:].contiguous()
    expected = case.reference("topk", tail=True)
    problem = problem_of_case(case, means=means_of(case), stats=True)
    assert_equals(selection_for("topk", case).run(problem, "cpu"), expected, torch.float32, seed)


def pages_problem(case: Case, new: int, stats: bool) -> Problem:
    """Decoding by pages of which those of the last ``new`` keys are to be summarised."""
    B, Hkv, Lk, D = case.key.shape
    P = page_count(Lk, case.block_size)
    codes = torch.zeros(B, Hkv, P, 3, D, dtype=torch.int8)
    pages = PageStatistics(codes, torch.zeros(B, Hkv, P, 3))
    end = case.visible[..., 1].amax(-1)
    update_pages_(case.key, case.origin[:, 0], torch.zeros(B, dtype=torch.int32), Lk, end - new, pages, case.block_size)
    return problem_of_case(case, key_index=tuple(pages), page_size=case.block_size, stats=stats, new=new, most=Lk)


@pytest.mark.parametrize("block", range(4))
def test_pages_are_chosen_and_attended_as_defined(block):
    for seed in range(block * 60, block * 60 + 60):
        case = decode_case(seed)
        problem = pages_problem(case, seed % 4 if bool((case.origin == 0).all()) else 0, stats=seed % 2 == 0)
        assert_equals(Block(size=case.block_size).run(problem, "cpu"), case.reference("pages"), torch.float32, seed)


@pytest.mark.parametrize("kind", [all_equal, huge_norms, denormals, heavy_tails, clustered])
def test_pages_of_hard_keys_are_chosen_as_defined(kind):
    for seed in range(300, 330):
        case = decode_case(seed)
        case.key = kind(case.key)
        result, expected = (
            Block(size=case.block_size).run(pages_problem(case, 0, False), "cpu"),
            case.reference("pages"),
        )
        assert torch.equal(result.attended, expected.attended), seed
        assert relative_error(result.output, expected.output) < 1e-4, seed


@pytest.mark.parametrize("kind", ["codes", "means", "pages"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_indexes_are_pytorchs_to_rounding(kind, dtype):
    for seed in range(12):
        case = tail_case(seed, 300, dtype)
        B, _, Lk, _ = case.key.shape
        start, end = case.origin[:, -1], torch.full((B,), Lk, dtype=torch.int32)
        options = {"value": case.value, "start": start, "end": end}
        found, expected = (
            KeyIndex.build(case.key, kind, **options, backend=backend).tensors() for backend in ("cpu", "torch")
        )
        for b in range(B):
            first = int(start[b])
            whole = (Lk - first) // 16
            of_kind = {"codes": (first, Lk), "means": (first // 16, first // 16 + whole), "pages": (0, whole)}
            rows = slice(*of_kind[kind])
            for mine, its in zip(found, expected, strict=True):
                mine, its = (t[b] if t.shape[2:] == case.key.shape[3:] else t[b, :, rows] for t in (mine, its))
                tolerance = 1.0 if mine.dtype == torch.int8 else TOLERANCE[dtype]
                torch.testing.assert_close(mine.float(), its.float(), atol=tolerance, rtol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 700, 48, generator=g) for heads in (6, 2, 2))
    index = {kind: KeyIndex.build(key, kind) for kind in ("codes", "pages")}
    found: dict[int, list[torch.Tensor]] = {}
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found[threads] = [
            *(
                sparse_attention(query, key, value, alpha=2.0, C=0.6, selection=name)
                for name in SELECTIONS
                if name != "drop"
            ),
            sparse_attention(query[:, :, -1:], key, value, alpha=2.0, C=0.6, index=index["codes"]),
            sparse_attention(query[:, :, -1:], key, value, alpha=2.0, C=0.6, selection="block", index=index["pages"]),
        ]
    for threads in (2, 3, 5):
        assert all(torch.equal(x, y) for x, y in zip(found[threads], found[1], strict=True))


def test_two_threads_generate_with_one_model():
    model = patch_model(tiny_model("llama"), 1.0, 0.6)
    prompts = [random_ids(1, 40 + 7 * i) for i in range(2)]
    alone = [model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0) for ids in prompts]
    for _ in range(3):
        found: list[torch.Tensor] = [torch.empty(0)] * 2

        def work(i: int, found: list[torch.Tensor] = found) -> None:
            found[i] = model.generate(prompts[i], max_new_tokens=20, do_sample=False, pad_token_id=0)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))


IN_A_WORKER = """
import sys
import torch
import torch.multiprocessing as processes
from nc_patch import sparse_attention

def attend(seed):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, 2, 300, 16, generator=g) for _ in range(3)]
    return float(sparse_attention(*tensors, alpha=2.0, C=0.5).sum())

if __name__ == "__main__":
    torch.set_num_threads(2)
    here = [attend(seed) for seed in range(4)]
    with processes.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(attend, range(4)) == here
    print("equal")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_attend_alike(method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(IN_A_WORKER)
    done = subprocess.run(
        [sys.executable, str(program), method], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))},
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-2000:]


WITHOUT_NUMBA = """
import sys
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)
sys.modules["numba"] = None
import torch
from nc_patch import KeyIndex, sparse_attention
tensors = [torch.randn(1, 2, 100, 16) for _ in range(3)]
for selection in ("topk", "block", "window", "dense"):
    sparse_attention(*tensors, alpha=2.0, C=0.5, selection=selection)
index = KeyIndex.build(tensors[1], "codes")
sparse_attention(tensors[0][:, :, -1:], *tensors[1:], alpha=2.0, C=0.5, index=index)
try:
    sparse_attention(*tensors, alpha=2.0, C=0.5, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_numba_pytorch_runs_and_says_once_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))},
    )  # fmt: skip
    assert "needs Numba (pip install 'nc_patch[cpu]')" in done.stdout, done.stderr[-2000:]
    assert "the CPU kernels need Numba" in done.stderr


def test_memory_grows_with_keys_and_not_with_queries_times_keys():
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    n = 6000  # Lq * Lk * heads in float32 would be 288 MB
    query, key = torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16)
    visible = causal_intervals(1, n, n, "cpu")
    budget = torch.full((1, 1, n), 50, dtype=torch.int32).minimum(visible[..., 1][:, None])
    problem = Problem(query, key, key, visible, visible[..., 0].contiguous(), budget, scale=0.25)
    before = process.memory_info().rss
    for selection in (TopK(), Block()):
        selection.run(problem, "cpu")
    assert process.memory_info().rss - before < 150e6
