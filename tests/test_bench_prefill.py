"""``nc-patch bench prefill``: what it measures and writes on the CPU, at sizes that say nothing about speed."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from operations import problem_of
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nc_patch.bench import cases, flops, prefill, prefill_checks, prefill_report, prefill_rivals, prefill_steps, prompts
from nc_patch.bench.checks import compare
from nc_patch.bench.dense_rivals import Absent
from nc_patch.bench.inputs import GEOMETRIES, Geometry
from nc_patch.cli import main
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import Block
from nc_patch.selections.block.blocks import block_of_rows, make_plan, query_block_table, sampled_rows

CPU = torch.device("cpu")
TINY = Geometry(4, 2, 16, 64, 96, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A geometry and a matrix product that take no time."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setitem(prefill.PREFILL.defaults["cpu"], "ceiling_size", 64)


def bench(out, *further):
    arguments = (
        "--device",
        "cpu",
        "--geometry",
        "tiny",
        "--lengths",
        "100",
        "200",
        "--repeats",
        "2",
        "--alpha",
        "4",
        "--C",
        "0.6",
        "--dense-below",
        "0",
    )
    return main(["bench", "prefill", *arguments, "--out", str(out), *further])


def read(out):
    return json.loads((out / "prefill.json").read_text())


def prompt(length=200, batch=1, seed=0):
    return prompts.make_prompt(TINY, batch, length, torch.float32, CPU, seed)


def test_a_run_writes_every_method_of_every_case_right_and_timed(tmp_path, capsys):
    assert bench(tmp_path, "--batch", "2") == 0
    record = read(tmp_path)
    assert record["matrix_flops_per_second"] > 0
    rows = {(row["length"], row["method"]): row for row in record["rows"] if row["status"] == "ok"}
    for length in (100, 200):
        for method in ("block", "window", "topk", "sdpa flash, gqa", "sdpa flash, expanded", "sdpa math, gqa"):
            row = rows[length, method]
            assert row["right"]
            assert row["compared_with"] == "reference, float64"
            assert row["median_seconds"] > 0
            rate = record["matrix_flops_per_second"]
            assert row["roofline_fraction"] == pytest.approx(row["flops"] / rate / row["median_seconds"])
        block = rows[length, "block"]
        assert set(block["step_seconds"]) == {"plan", "score", "choose", "attend"}
        assert all(seconds > 0 for seconds in block["step_seconds"].values())
        assert block["flops"] == sum(block["step_flops"].values())
        assert block["enlarged"] == 0
        assert {"best_keys_mass", "keys_of_mass", "sink_mass", "local_mass"} == set(block["scores"])
    of_dense = next(row for row in record["exponents"] if row["method"] == "dense")
    assert of_dense["flops"] == pytest.approx(2)
    assert {row["method"] for row in record["exponents"]} == {"dense", "block", "window", "topk"}
    said = capsys.readouterr().out
    assert "tiny, batch 2, budget 4 n^0.6: milliseconds a layer" in said
    assert "the law's is 1 + C = 1.6, dense 2" in said
    assert "sdpa cudnn, gqa: the cudnn backend needs a GPU" in said
    assert "% of dense; cpu" in said


def test_beyond_the_reference_rows_are_compared_with_the_pytorch_backend_and_dense_ones_with_float64(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(prefill_checks, "REFERENCE_SCORES", 4 * 150 * 150)
    assert bench(tmp_path, "--dtype", "bfloat16") == 0
    against = {(row["length"], row["method"]): row["compared_with"] for row in read(tmp_path)["rows"] if "right" in row}
    assert against[100, "block"] == "reference, float64"
    assert against[200, "block"] == against[200, "topk"] == against[200, "window"] == "PyTorch backend"
    assert against[200, "sdpa flash, gqa"] == "float64"


@pytest.mark.parametrize("selection", ["block", "topk", "window", "dense"])
def test_all_ways_to_what_is_right_agree(selection, monkeypatch):
    options = {"min_mass": 0.8, "tail": "drop", "dense_below": 0}
    inputs, config = prompt(), NCConfig(2.0, 0.6, selection=selection, **options)
    rows = prefill_checks.checked_rows(200, 64)
    reference = prefill_checks.expected_rows(inputs, config, rows)
    monkeypatch.setattr(prefill_checks, "REFERENCE_SCORES", 0)
    other = prefill_checks.expected_rows(inputs, config, rows)
    assert other.against != reference.against
    assert (other.output - reference.output).norm() < 1e-5 * reference.output.norm()
    assert other.attended == pytest.approx(reference.attended)
    assert other.kept_mass == pytest.approx(reference.kept_mass, rel=1e-5)
    whole = sparse_attention(inputs.query, inputs.key, inputs.value, alpha=2.0, C=0.6, selection=selection, **options)
    assert compare(whole[:, :, rows], reference, selection)["right"]


def test_checked_rows_are_whole_query_blocks_with_the_first_and_the_last():
    assert prefill_checks.checked_rows(50, 64).tolist() == list(range(50))
    rows = prefill_checks.checked_rows(1000, 64)
    assert len(rows) == 3 * 64 + 1000 - 960
    assert rows[:64].tolist() == list(range(64))
    assert rows[-1] == 999
    assert len(rows.unique()) == len(rows)


def test_a_wrong_output_is_recorded_and_the_run_fails(tmp_path, capsys, monkeypatch):
    right = prefill.sparse_attention
    monkeypatch.setattr(prefill, "sparse_attention", lambda *a, **k: right(*a, **k) * 1.1)
    assert bench(tmp_path, "--selections", "block") == 1
    rows = [row for row in read(tmp_path)["rows"] if row["method"] == "block"]
    assert all(row["status"] == "wrong" and "median_seconds" not in row for row in rows)
    assert "sparse attention failed or was wrong in 2 rows" in capsys.readouterr().err


def test_a_value_that_is_not_finite_in_a_row_that_is_not_compared_is_wrong(tmp_path, monkeypatch):
    right = prefill.sparse_attention

    def spoiled(*arguments, **options):
        output = right(*arguments, **options)
        output[:, :, 150] = torch.nan
        return output

    monkeypatch.setattr(prefill, "checked_rows", lambda length, size: torch.arange(64))
    monkeypatch.setattr(prefill, "sparse_attention", spoiled)
    assert bench(tmp_path, "--selections", "block", "--lengths", "200") == 1


def test_options_reach_the_attention(tmp_path):
    known = ("--selections", "block", "--lengths", "300", "--repeats", "1", "--alpha", "1")
    assert bench(tmp_path / "plain", *known) == 0
    more = ("--min-mass", "0.99", "--max-factor", "8", "--block-size", "32", "--query-block-size", "128")
    assert bench(tmp_path / "more", *known, *more, "--sample-stride", "1", "--local-keys", "32") == 0
    plain, enlarged = (read(tmp_path / name)["rows"][0] for name in ("plain", "more"))
    assert plain["enlarged"] == 0
    assert enlarged["enlarged"] > 0
    assert enlarged["kept_mass"] > plain["kept_mass"]
    assert enlarged["step_flops"]["score"] > 1.5 * plain["step_flops"]["score"]
    (options,) = read(tmp_path / "more")["settings"]["options"]
    names = ("size", "query_block_size", "sample_stride", "local_keys")
    assert [options[name] for name in names] == [32, 128, 1, 32]
    assert bench(tmp_path / "dense", *known, "--dense-below", "300") == 0
    (dense,) = (row for row in read(tmp_path / "dense")["rows"] if row["method"] == "block")
    assert (dense["attended"], dense["step_flops"]["score"]) == (150.5, 0)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--block-size", "48"), "invalid choice: 48"),
        (("--min-mass", "2"), "min_mass must be a number in (0, 1)"),
        (("--max-factor", "0.5"), "max_factor must be a number of at least 1"),
        (("--sample-stride", "5"), "invalid choice: 5"),
        (("--local-keys", "-1"), "local_keys must be at least 0, got -1"),
        (("--dense-below", "-1"), "dense_below must be at least 0, got -1"),
        (("--generate", "8"), "unrecognized arguments: --generate"),
        (("--forward", "1"), "must be at least 2, got 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, capsys, further, message):
    assert bench(tmp_path / "out", *further) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_forward_times_dense_and_patched_models(tmp_path, capsys):
    assert bench(tmp_path, "--lengths", "64", "--selections", "block", "window", "--forward", "70", "90") == 0
    rows = read(tmp_path)["forward"]
    assert {(row["length"], row["method"]) for row in rows} == {
        (length, method) for length in (70, 90) for method in ("dense", "block", "window")
    }
    assert all(row["status"] == "ok" and row["median_seconds"] > 0 for row in rows)
    assert "forward, a random model of few layers" in capsys.readouterr().out


def test_with_matplotlib_there_is_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench(tmp_path, "--selections", "window") == 0
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")


def test_operations_are_those_of_the_rows_that_are_scored_and_the_pairs_that_are_attended():
    length, geometry = 333, Geometry(6, 2, 32, 0, 0, 0)
    visible = causal_intervals(1, length, length, "cpu")
    table = query_block_table(visible, visible[..., 0], 64)
    owner = block_of_rows(table, 1, length)
    key = torch.zeros(1, 2, length, 8)
    budget = visible[:, None, :, 1].clamp(max=16)
    problem = problem_of(torch.zeros(1, 6, length, 8), key, key, visible, budget)
    for stride in (1, 4, 16, 64):
        plan = make_plan(problem, Block(sample_stride=stride, local_keys=0))
        sampled = sampled_rows(table, visible, visible[..., 0], owner, torch.full_like(table.first, stride))
        # The first query block attends all its keys.
        pairs = int(visible[:, 64:, 1][sampled[:, 64:]].sum())
        assert flops.score_flops(geometry, 3, plan.samples) == 3 * 6 * pairs * 2 * 32
    assert flops.dense_flops(geometry, 3, 1000) == 4 * 3 * 6 * 32 * 1000**2 / 2
    every = 6 * length * (length + 1) // 2
    assert flops.attend_flops(geometry, every) == pytest.approx(flops.dense_flops(geometry, 1, length), rel=4e-3)
    assert flops.topk_flops(geometry, 1, length, every) == flops.attend_flops(geometry, every)


def test_what_block_attends_is_counted_from_its_choice(tmp_path):
    assert bench(tmp_path, "--selections", "block", "window", "--lengths", "200", "--alpha", "2") == 0
    row, window = read(tmp_path)["rows"][:2]
    inputs = prompt()
    result = sparse_attention(inputs.query, inputs.key, inputs.value, alpha=2.0, C=0.6, selection="block",
                              return_stats=True, dense_below=0)  # fmt: skip
    assert row["attended"] == pytest.approx(float(result.attended.double().mean()))
    assert row["step_flops"]["attend"] == 4 * 16 * int(result.attended.sum())
    budget = NCConfig(2.0, 0.6, dense_below=0).row_budgets(causal_intervals(1, 200, 200, "cpu"), 200, 0)
    assert window["flops"] == 4 * 16 * 4 * int(budget.sum())


def test_exponents_of_powers_are_found():
    points = [(n, 3.0 * n**1.6) for n in (100, 300, 1000, 5000)]
    assert prefill_report.exponent(points) == pytest.approx(1.6)
    assert prefill_report.exponent(points[:1]) is None
    assert prefill_report.exponent([(100, 1.0), (100, 2.0)]) is None
    noisy = [(100, 1.0), (1000, 120.0), (10000, 9000.0)]
    slope = torch.tensor(noisy, dtype=torch.float64).log()
    x, y = slope[:, 0] - slope[:, 0].mean(), slope[:, 1]
    assert prefill_report.exponent(noisy) == pytest.approx(float((x * y).sum() / (x * x).sum()))


def test_a_clock_adds_up_what_lies_between_marks(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(prefill_steps.time, "perf_counter", lambda: next(now))
    clock = prefill_steps.StepClock(CPU)
    for name in ("plan", "score", "choose", "score", "attend"):
        clock(name)
    assert clock.seconds() == {"plan": 1.0, "score": 2.0 + 4.0, "choose": 3.0, "attend": 5.0}


def test_a_clock_of_a_gpu_records_events_and_reads_them_when_all_is_done(monkeypatch):
    """Stand-ins for CUDA's events, whose times may be read only after a synchronisation."""
    now, done = iter(range(10)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, end):
            assert done
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    clock = prefill_steps.StepClock(torch.device("cuda"))
    for name in ("plan", "score", "choose", "attend", "attend"):
        clock(name)
    assert clock.seconds() == {"plan": 1.0, "score": 1.0, "choose": 1.0, "attend": 2.0}


def test_a_run_on_the_triton_backend_in_its_interpreter(tmp_path):
    pytest.importorskip("triton")
    script = f"""
from nc_patch.bench.inputs import GEOMETRIES, Geometry
from nc_patch.cli import main
GEOMETRIES["tiny"] = Geometry{tuple(vars(TINY).values())}
arguments = ["--device", "cpu", "--geometry", "tiny", "--lengths", "70", "--repeats", "1", "--selections", "block",
             "--dense-below", "0", "--alpha", "4", "--C", "0.6"]
raise SystemExit(main(["bench", "prefill", *arguments, "--out", {str(tmp_path)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(prefill.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = read(tmp_path)["rows"][0]
    assert (row["method"], row["backend"], row["status"]) == ("block", "triton", "ok")
    assert all(row["step_seconds"][step] > 0 for step in ("plan", "score", "choose", "attend"))
    assert "Steps of block in milliseconds" in done.stdout


def row_of(method, length, seconds=None, kind="dense", **more):
    known = {"geometry": "tiny", "batch": 1, "length": length, "method": method, "kind": kind, "status": "ok"}
    return {**known, **({} if seconds is None else {"median_seconds": seconds}), **more}


@pytest.mark.parametrize(
    ("kind", "before", "wanted", "message"),
    [
        ("sparse", [], True, None),
        ("sparse", [row_of("fast", 100, 0.5), row_of("slow", 100, 0.95)], True, None),
        ("sparse", [row_of("fast", 100, 1.0), row_of("slow", 100, 2.1)], False, "took 2.1 times as long"),
        ("sparse", [row_of("fast", 100, 0.1), row_of("slow", 100, 0.21)], True, None),
        ("sparse", [row_of("fast", 100, 2.0), row_of("slow", 100, 2.5)], False, "took 1.2 times as long"),
        ("sparse", [row_of("slow", 100, status="out of memory")], False, "no memory at 100 keys"),
        ("sparse", [row_of("slow", 100, status="left out", message="took 9 times")], False, "took 9 times"),
        ("dense", [row_of("fast", 100, 0.5), row_of("slow", 100, 0.54)], True, None),
        ("dense", [row_of("fast", 100, 0.5), row_of("slow", 100, 0.6)], False, "took 1.2 times as long"),
        ("dense", [row_of("fast", 100, 0.1), row_of("slow", 100, 0.2)], True, None),
    ],
    ids=[
        *("first", "fast-enough", "slow", "slow-and-short", "long", "memory", "left-out"),
        *("dense-fast-enough", "dense-slow", "dense-slow-and-short"),
    ],
)
def test_methods_that_were_slow_are_left_out_of_long_cases(kind, before, wanted, message):
    row = row_of("slow", 200, kind=kind)
    assert cases.is_wanted(row, before, float("inf"), growth=2.0) is wanted
    assert wanted or message in row["message"]
    assert cases.is_wanted(row_of("slow", 200, kind=kind), before, float("inf"), growth=2.0, always=True)
    late = row_of("slow", 200, kind=kind)
    assert not cases.is_wanted(late, before, 0.0, growth=2.0, always=True)
    assert late["status"] == "out of time"


def test_a_case_that_cannot_end_in_time_does_not_begin():
    settings = cases.Settings(CPU, torch.float32, ("tiny",), (1,), (100, 1000), (), 1.0, 0.0, 1)
    seen = []

    def measure(case, *_):
        seen.append(case.length)
        return [row_of("dense", case.length, 1.0)]

    deadline = cases.time.monotonic() + 60
    rows = list(cases.measure_all(measure, 2.0, settings, 1.0, deadline, lambda case: None))
    assert seen == [100]
    assert rows[1][0]["status"] == "out of time"
    assert "takes 400 s or more" in rows[1][0]["message"]
    assert len(list(cases.measure_all(measure, 0.0, settings, 1.0, deadline, lambda case: None))) == 2
    assert seen == [100, 100, 1000]


def test_prompts_are_the_same_for_a_seed_and_others_for_another():
    first, again, other = prompt(seed=0), prompt(seed=0), prompt(seed=1)
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.key, again.key)
    assert not torch.equal(first.key, other.key)
    assert first.query.isfinite().all()


def test_prompts_are_local_have_sinks_and_seek_few_of_the_other_keys():
    n, geometry = 4096, Geometry(6, 2, 64, 0, 0, 0)
    one = prompts.make_prompt(geometry, 1, n, torch.float32, CPU, 0)
    config = NCConfig(4.0, 0.6, dense_below=0)
    budgets = config.row_budgets(causal_intervals(1, n, n, "cpu"), n, 0)[0, 0]
    found = prompts.prompt_concentration(one, budgets)
    assert 0.9 < found["best_keys_mass"] < 0.99
    assert 0.15 < found["sink_mass"] < 0.6
    assert 0.03 < found["local_mass"] < 0.4
    assert 50 < found["keys_of_mass"] < n / 4
    query, key = one.query[0, :, 2048:].float(), one.key[0].float().repeat_interleave(3, 0)
    scores = (query @ key.transpose(1, 2)) * 64**-0.5
    scores.masked_fill_(torch.arange(n) > torch.arange(2048, n)[:, None], -torch.inf)
    softmax = torch.softmax(scores, -1)
    nearest = torch.stack([softmax[:, i, 2048 + i] for i in range(2048)]).mean()
    at_100 = torch.stack([softmax[:, i, 1948 + i] for i in range(2048)]).mean()
    assert nearest > 3 * at_100
    # Queries of one run seek what others of the run seek: their softmaxes overlap more than those of far rows do.
    kept = softmax[:, :, 64:1900]
    near, far = ((kept[:, 1000] * kept[:, other]).sum(-1).mean() for other in (1001, 1700))
    assert near > far


def test_positions_go_on_where_a_piece_of_a_prompt_ends(monkeypatch):
    whole = prompts._positions(0, 200, prompts._frequencies(16, CPU))
    assert torch.equal(whole[120:], prompts._positions(120, 80, prompts._frequencies(16, CPU)))
    monkeypatch.setattr(prompts, "_ROWS_AT_ONCE", 64)
    one = prompt()
    budget = torch.arange(1, 201).clamp(max=30)
    assert prompts.prompt_concentration(one, budget)["local_mass"] > 0.3


def expected_dense(inputs):
    return scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("length", [64, 300, 512])
def test_the_mask_of_flex_attention_is_causal(length):
    inputs = prompt(length)
    mask = prefill_rivals.causal_blocks(length, CPU)
    output = flex_attention(inputs.query, inputs.key, inputs.value, block_mask=mask, enable_gqa=True)
    assert torch.allclose(output, expected_dense(inputs), atol=1e-5)


def test_the_rivals_here_are_right_and_the_others_say_why_they_are_not():
    inputs, absent = prompt(), set()
    for name, make in prefill_rivals.rivals(CPU).items():
        try:
            assert torch.allclose(make(inputs)(0), expected_dense(inputs), atol=1e-5)
        except Absent as error:
            absent.add((name, str(error)))
    assert {name for name, _ in absent} == {
        f"sdpa {b}, {f}" for b in ("cudnn", "efficient") for f in ("gqa", "expanded")
    }


def test_plain_attention_is_not_tried_on_long_prompts(monkeypatch):
    monkeypatch.setattr(prefill_rivals, "_MATH_KEYS", 100)
    with pytest.raises(Absent, match="tried up to 100 keys"):
        prefill_rivals.rivals(CPU)["sdpa math, gqa"](prompt())


def test_rivals_that_are_not_installed_are_absent_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("flash_attn", "flash_attn 3", "flashinfer"):
        with pytest.raises(Absent, match="is not installed"):
            prefill_rivals.rivals(torch.device("cuda"))[name](prompt())


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn 3", "flashinfer"])
def test_rivals_of_other_packages_are_called_with_their_layouts(name, monkeypatch):
    """Stand-ins with the packages' documented layouts; whether the packages agree only a GPU can tell."""

    def attend(query, key, value, causal):
        assert causal
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
        return (output, None) if name == "flash_attn 3" else output

    class Wrapper:
        def __init__(self, workspace, layout):
            assert layout == "NHD"

        def plan(self, queries, keys, heads, kv_heads, head_dim, *, causal, **dtypes):
            assert (heads, kv_heads, head_dim, causal) == (4, 2, 16, True)
            assert torch.equal(queries, keys)
            self.ends = queries.tolist()

        def run(self, *tensors):
            assert all(tensor.is_contiguous() for tensor in tensors)
            ranges = [slice(begin, end) for begin, end in zip(self.ends[:-1], self.ends[1:], strict=True)]
            return torch.cat([attend(*(tensor[None, rows] for tensor in tensors), causal=True)[0] for rows in ranges])

    module = types.SimpleNamespace(
        flash_attn_func=attend, BatchPrefillWithRaggedKVCacheWrapper=Wrapper, __spec__=object()
    )
    for package in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, package, module)
    inputs = prompt(130, batch=2)
    output = prefill_rivals.rivals(torch.device("cuda"))[name](inputs)(0)
    assert torch.allclose(output, expected_dense(inputs), atol=1e-5)


def test_a_prompt_without_memory_is_skipped_with_its_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prefill, "free_bytes", lambda device: 100 * 2 * (4 + 2) * 16 * 4 / 0.6)
    assert bench(tmp_path) == 0
    rows = read(tmp_path)["rows"]
    assert [(row["length"], row["status"]) for row in rows if row["kind"] == "case"] == [(200, "out of memory")]
    assert any(row["length"] == 100 and row["status"] == "ok" for row in rows)
    assert "GB of queries, keys, values and outputs" in capsys.readouterr().out
