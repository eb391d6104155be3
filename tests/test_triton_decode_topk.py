"""Top-k decoding from codes against the float64 reference: on a GPU where there is one, and in Triton's interpreter.

As in ``test_triton_kernels.py`` the interpreter needs a process of its own, which the last test starts.
"""

import itertools
import math
import os
from dataclasses import dataclass, replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")
tl = pytest.importorskip("triton.language")

from gpu_semantics import check_as_on_a_gpu  # noqa: E402
from operations import (  # noqa: E402
    INTERPRETED,
    assert_close,
    implementation,
    on_kernel_device,
    problem_of,
    reference_attention,
    topk_mask,
)
from small_plans import plan_with  # noqa: E402

from nc_patch import KeyIndex  # noqa: E402
from nc_patch.budget import budget_of  # noqa: E402
from nc_patch.ops.means import PageMeans  # noqa: E402
from nc_patch.ops.problem import MAX_DECODE_QUERIES, causal_intervals  # noqa: E402
from nc_patch.ops.triton.split import MAX_SPLITS  # noqa: E402
from nc_patch.selections import TopK  # noqa: E402
from nc_patch.selections.topk import decode as triton_decode_topk  # noqa: E402
from nc_patch.selections.topk.codes import KeyCodes, channel_moments, encode_keys  # noqa: E402
from nc_patch.selections.topk.encode import triton_encode_keys_  # noqa: E402
from nc_patch.selections.topk.plan import Scratch, Sizes, plan_for  # noqa: E402
from nc_patch.selections.topk.scan import column_norms  # noqa: E402

# The interpreter is slow: there some variations run only with NC_PATCH_LONG=1.
THOROUGH = not INTERPRETED or os.environ.get("NC_PATCH_LONG") == "1"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which short inputs cross many tiles in the interpreter."""
    plan_with(monkeypatch)


@dataclass(frozen=True)
class Case:
    """One input: its shape, what its queries may see, and its settings."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 1
    group: int = 3
    queries: int = 1
    keys: int = 130
    head_dim: int = 64
    value_dim: int | None = None
    intervals: str = "causal"
    budgets: str = "small"
    softcap: float = 0.0
    sinks: bool = False
    sink_keys: int = 4
    recent_keys: int = 2
    bounds: bool = True
    capacity: int = 0

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("bf16-g4", torch.bfloat16, 2, 2, 4, bounds=False),
    Case("bf16-d80-g7-left-padding", torch.bfloat16, 2, group=7, head_dim=80, queries=2, intervals="padding"),
    Case("fp16-d96-g1", torch.float16, group=1, head_dim=96, queries=5, sink_keys=0, recent_keys=0),
    Case("fp32-d128-sinks-softcap", head_dim=128, sinks=True, softcap=3.0, queries=2),
    Case("sixteen-queries-per-head-budgets", queries=16, group=3, budgets="per_head", keys=60),
    Case("fp32-d192-narrow-values", head_dim=192, value_dim=128, group=1),
    Case("bf16-d256-softcap", torch.bfloat16, head_dim=256, softcap=5.0, keys=70),
    Case("ragged-and-empty", batch=2, queries=5, intervals="ragged", budgets="any", keys=120),
    Case("all-empty", intervals="empty", sinks=True),
    Case("sliding", queries=5, intervals="sliding", sinks=True),
    Case("forced-keys-fill-the-budget", sink_keys=40, recent_keys=50, budgets="any", queries=3),
    Case("full-budget", budgets="full", keys=77),
    Case("one-key", keys=1),
    Case("garbage-beyond-the-end", intervals="static", capacity=150, batch=2),
]


def inputs_of(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Random inputs of a case, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    B, Lq, Lk, D = case.batch, case.queries, case.keys, case.head_dim
    heads = case.kv_heads * case.group
    query = torch.randn(B, heads, Lq, D, generator=g)
    key = torch.randn(B, case.kv_heads, Lk, D, generator=g) + torch.randn(D, generator=g)
    value = torch.randn(B, case.kv_heads, Lk, case.value_dim or D, generator=g)
    visible = causal_intervals(B, Lq, Lk, "cpu").clone()
    if case.intervals == "padding":
        visible[..., 0] = (37 * torch.arange(B, dtype=torch.int32))[:, None]
    elif case.intervals == "sliding":
        visible[..., 0] = (visible[..., 1] - 70).clamp(min=0)
    elif case.intervals == "static":
        visible[..., 1] -= 41
    elif case.intervals == "empty":
        visible[...] = 5
    elif case.intervals == "ragged":
        visible = torch.randint(0, Lk + 1, (B, Lq, 2), generator=g).sort(-1).values.to(torch.int32)
        visible[:, 1:2] = 3
    n = (visible[..., 1] - visible[..., 0])[:, None]
    if case.budgets == "full":
        budget = n.clone()
    elif case.budgets == "small":
        budget = torch.minimum(n, 1 + (1.2 * n.double() ** 0.6).int())
    else:
        share = torch.rand((B, heads if case.budgets == "per_head" else 1, Lq), generator=g)
        budget = (share * (n + 1)).int().minimum(n).contiguous()
    sinks = torch.randn(heads, generator=g) if case.sinks else None
    query, key, value = (x.to(case.dtype) for x in (query, key, value))
    if case.intervals == "static":
        key[:, :, Lk - 41 :] = torch.nan
        value[:, :, Lk - 41 :] = torch.nan
    return {"query": query, "key": key, "value": value, "visible": visible, "budget": budget, "sinks": sinks}


def codes_of(case: Case, inputs: dict[str, torch.Tensor | None]) -> KeyCodes:
    """The codes of a case's keys, in buffers that are larger where the case has a capacity, garbage beyond."""
    key, visible = inputs["key"], inputs["visible"]
    center, spread = channel_moments(key, visible[..., 0].amin(1), visible[..., 1].amax(1))
    codes = list(encode_keys(key, center, spread))
    if case.capacity:
        for i, tensor in enumerate(codes):
            garbage = torch.nan if tensor.is_floating_point() else 77
            wide = tensor.new_full((*tensor.shape[:2], case.capacity, *tensor.shape[3:]), garbage)
            wide[:, :, : tensor.shape[2]] = tensor
            codes[i] = wide
    return KeyCodes(*codes, center, spread)


def run(case: Case, device: str, inputs: dict[str, torch.Tensor | None], codes: KeyCodes | None = None):
    """What the kernels return, on the CPU."""
    codes = codes_of(case, inputs) if codes is None else codes
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    problem = problem_of(
        **moved,
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
        key_index=tuple(x.to(device) for x in codes),
        most=int(inputs["budget"].max()),
        bounds=case.bounds,
        stats=True,  # the log-sum-exp
    )
    results = implementation(TopK(case.sink_keys, case.recent_keys, "drop"), problem, "triton")
    return tuple(x.cpu() for x in results)


def expect(case: Case, inputs: dict[str, torch.Tensor | None]):
    return reference_attention(
        **inputs,
        selection="topk",
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
        sink_keys=case.sink_keys,
        recent_keys=case.recent_keys,
    )


def assert_contains(bounds: torch.Tensor, kept_mass: torch.Tensor) -> None:
    assert torch.equal(bounds.isnan(), torch.zeros_like(bounds, dtype=torch.bool))
    assert bounds.min() >= 0
    assert bounds.max() <= 1
    known = ~kept_mass.isnan()
    assert (bounds[..., 0].double() <= kept_mass)[known].all()
    assert (bounds[..., 1].double() >= kept_mass)[known].all()


def check(case: Case, device: str, inputs: dict[str, torch.Tensor | None], codes: KeyCodes | None = None):
    output, lse, bounds = run(case, device, inputs, codes)
    expected = expect(case, inputs)
    assert output.dtype == case.dtype
    assert_close(output, expected.output, TOLERANCE[case.dtype])
    assert_close(lse, expected.lse, 1e-5)
    if case.bounds:
        assert_contains(bounds, expected.kept_mass)
    else:
        assert bounds.numel() == 0
    return output, bounds


def part_of(scratch: Scratch, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A part of the memory that the kernels of a step hand on, as it is now."""
    begin = getattr(scratch, name)
    return scratch.memory[begin : begin + math.prod(shape)].view(dtype).view(shape)


class Watched:
    """A kernel that keeps the arguments of its last launch, before which ``change`` may change what it reads."""

    def __init__(self, kernel, change=None):
        self.kernel, self.change, self.arguments, self.arg_names = kernel, change, {}, kernel.arg_names

    def __getitem__(self, grid):
        def launch(**kwargs):
            self.arguments = kwargs
            if self.change is not None:
                self.change(**kwargs)
            self.kernel[grid](**kwargs)

        return launch


@pytest.fixture
def taken_whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks of each call chose among all keys."""
    seen: list[int] = []

    def look(inputs, scratch, num_kv_heads, group, Lq, ROWS, **_):
        blocks = inputs.visible.shape[0] * num_kv_heads * -(-group * Lq // ROWS)
        seen.append(int(part_of(scratch, "whole", blocks, dtype=torch.int32).sum()))

    monkeypatch.setattr(triton_decode_topk, "choose_kernel", Watched(triton_decode_topk.choose_kernel, look))
    return seen


@on_kernel_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_equals_the_reference_and_bounds_hold(case, device, taken_whole):
    check(case, device, inputs_of(case))
    assert taken_whole == [0]


@on_kernel_device
def test_queries_that_go_one_after_another_give_what_they_give_together(device, monkeypatch):
    case = Case("parts", torch.bfloat16, 2, queries=3, keys=90, sinks=True, budgets="per_head", intervals="padding")
    inputs, calls = inputs_of(case), []
    decode = triton_decode_topk._decode_at_once

    def counting(problem, *rest):
        calls.append(tuple(problem.query.shape))
        return decode(problem, *rest)

    monkeypatch.setattr(triton_decode_topk, "_decode_at_once", counting)
    together, lse, _ = run(case, device, inputs)
    monkeypatch.setattr(triton_decode_topk, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(triton_decode_topk, "_STEPS", {})
    output, lse_of_parts, bounds = run(case, device, inputs)
    torch.testing.assert_close(output, together, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse_of_parts, lse, atol=1e-6, rtol=1e-6)
    # What is listed besides the best keys depends on the rows that share a list, and so does how tight bounds are.
    assert_contains(bounds, expect(case, inputs).kept_mass)
    assert calls == [(2, 3, 3, 64)] + [(1, 3, 1, 64)] * 6


@on_kernel_device
def test_an_empty_row_keeps_all_mass(device):
    case = Case("empty", intervals="empty")
    _, _, bounds = run(case, device, inputs_of(case))
    assert torch.equal(bounds, torch.ones_like(bounds))


@on_kernel_device
@pytest.mark.parametrize("spoiled", ["segment", "guess", "none"])
def test_exactly_the_reference_set_is_attended_where_scores_tie(spoiled, device, taken_whole, monkeypatch):
    # Scores on a small integer grid are exact, and most of them tie; values that are the identity show the keys.
    case = Case("grid", queries=6, keys=128, group=2, kv_heads=2, budgets="any", head_dim=64, value_dim=128)
    spoil(spoiled, monkeypatch)
    inputs = inputs_of(case)
    g = torch.Generator().manual_seed(1)
    for name in ("query", "key"):
        inputs[name] = torch.zeros_like(inputs[name])
        inputs[name][..., :3] = torch.randint(-1, 2, (*inputs[name].shape[:3], 3), generator=g).float()
    inputs["value"] = torch.eye(128).expand(1, 2, 128, 128).contiguous()
    output, bounds = check(case, device, inputs)
    scores = inputs["query"].double() @ inputs["key"].double().repeat_interleave(2, 1).transpose(-1, -2)
    expected = topk_mask(scores, inputs["visible"], inputs["budget"], case.sink_keys, case.recent_keys)
    assert torch.equal(output > 0, expected)
    assert (taken_whole[0] > 0) == (spoiled != "none")
    assert bounds.shape == (1, 4, 6, 2)


def spoil(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the proof fail on purpose: by segments that are too small, or guesses of every second row too high."""
    if what == "segment":
        plan_with(monkeypatch, segment=10)
    elif what == "guess":

        def raise_guesses(query, scratch, num_kv_heads, group, Lq, **_):
            rows = query.data.shape[0] * num_kv_heads * group * Lq
            part_of(scratch, "guess", rows)[::2] = 1e30

        monkeypatch.setattr(triton_decode_topk, "scan_kernel", Watched(triton_decode_topk.scan_kernel, raise_guesses))


@on_kernel_device
@pytest.mark.parametrize("what", ["segment", "guess"])
def test_blocks_without_a_proof_choose_among_all_keys(what, device, taken_whole, monkeypatch):
    case = Case("spoiled", queries=3, softcap=4.0, sinks=True, budgets="per_head")
    spoil(what, monkeypatch)
    inputs = inputs_of(case)
    _, bounds = check(case, device, inputs)
    assert taken_whole == [1]
    # Every score is known exactly then.
    assert (bounds[..., 1] - bounds[..., 0]).max() < 1e-3


@on_kernel_device
def test_the_list_holds_what_may_reach_the_guess_of_any_row_and_rows_collect_what_does(device, monkeypatch):
    case = Case("lists", queries=2, group=3, keys=300, bounds=False)
    plan_with(monkeypatch, samples=256)
    inputs = inputs_of(case)
    inputs["budget"].fill_(10)
    watched = Watched(triton_decode_topk.choose_kernel)
    monkeypatch.setattr(triton_decode_topk, "choose_kernel", watched)
    score = Watched(triton_decode_topk.score_kernel)
    monkeypatch.setattr(triton_decode_topk, "score_kernel", score)
    run(case, device, inputs)
    scratch, splits, segment, stride = (score.arguments[name] for name in ("scratch", "splits", "segment", "stride"))
    integers = {"dtype": torch.int32}
    guess, scores = part_of(scratch, "guess", 6).cpu(), part_of(scratch, "scores", 6, stride).cpu()
    found = part_of(scratch, "positions", splits, segment, **integers).cpu()
    counts = part_of(scratch, "counts", splits, **integers).cpu()
    sure = part_of(scratch, "sure", 6, splits, **integers).cpu().sum(1)
    reached = part_of(scratch, "reached", 6, **integers).cpu()
    collected = part_of(scratch, "reached_positions", 6, stride, **integers).cpu()
    collected_scores = part_of(scratch, "reached_scores", 6, stride).cpu()

    query, key = inputs["query"][0].double(), inputs["key"][0, 0].double()
    exact = (query @ key.T).reshape(6, -1)  # a head's queries side by side, as in [B, Hq, Lq]
    start, end = inputs["visible"][0].repeat(3, 1).T[..., None]
    wanted = inputs["budget"][0, 0].repeat(3)[:, None]
    at = torch.arange(key.shape[0])
    seen = (at >= start) & (at < end)
    recent = wanted.clamp(max=case.recent_keys)
    forced = seen & ((at < start + (wanted - recent).clamp(max=case.sink_keys)) | (at >= end - recent))
    reaches = seen & ~forced & (exact >= guess[:, None])

    codes = codes_of(case, inputs)
    size = (query * codes.spread[0].double()).norm(dim=-1).reshape(6, 1)
    off = 2.01 * size * codes.residual[0, 0].double() + 1e-4
    listed = [found[s, : counts[s]].long() for s in range(splits)]
    assert all((positions.diff() > 0).all() for positions in listed)
    is_listed = torch.zeros(key.shape[0], dtype=torch.bool)
    is_listed[torch.cat(listed)] = True
    assert is_listed.sum() == counts.sum()
    assert not ((reaches | forced).any(0) & ~is_listed).any()
    assert not (is_listed & ~(forced | (seen & (exact + off >= guess[:, None]))).any(0)).any()
    assert is_listed.sum() < 250
    # What is said to be certain is, and it is most.
    assert (sure <= reaches.sum(1)).all()
    assert (sure >= (seen & ~forced & (exact - off >= guess[:, None])).sum(1)).all()

    for s, positions in enumerate(listed):
        own = scores[:, s * segment : s * segment + counts[s]].double()
        assert (own - exact[:, positions]).abs().max() < 1e-4
    for r in range(6):
        mine = collected[r, : reached[r]].long()
        assert torch.equal(mine.sort().values, reaches[r].nonzero()[:, 0])
        assert (collected_scores[r, : reached[r]].double() - exact[r, mine]).abs().max() < 1e-4


@on_kernel_device
def test_a_sample_is_not_in_step_with_a_text_that_repeats_itself(device, taken_whole, monkeypatch):
    # 64 samples of 1,024 keys, of which every sixteenth scores high: a sample in step sees these alone, or none.
    case = Case("periodic", group=1, keys=1024, bounds=False, sink_keys=0, recent_keys=0)
    for phase in range(0, 16, 2):
        inputs = inputs_of(case)
        inputs["key"] = 0.1 * inputs["key"]
        inputs["key"][:, :, phase::16] += 4 * inputs["query"] / inputs["query"].norm()
        inputs["budget"].fill_(100)
        check(case, device, inputs)
    assert taken_whole == [0] * 8


def _all_equal(key):
    key.fill_(0.5)


def _all_zero(key):
    key.zero_()
    key[:, :, ::2] *= -1


def _huge(key):
    key *= 1e30


def _tiny(key):
    key *= 1e-38


def _outlier(key):
    key[:, :, ::16] = 1e6


def _far_apart(key):
    key *= torch.logspace(-30, 16, key.shape[2])[:, None]


def _infinite(key):
    key[:, :, 11] = torch.inf
    key[:, :, 12] = -torch.inf
    key[:, :, 30] = torch.inf


def _nan(key):
    key[:, :, 11] = torch.nan
    key[:, :, 40] = torch.nan


SPOILS = [_all_equal, _all_zero, _huge, _tiny, _outlier, _far_apart, _infinite, _nan]


@on_kernel_device
@pytest.mark.parametrize(
    ("change", "segment"),
    # With room for all keys in the list, and without, so that blocks take all keys.
    [(change, (160, 20)[i % 2]) for i, change in enumerate(SPOILS)]
    + ([(_all_equal, 20), (_infinite, 20), (_nan, 160)] if THOROUGH else []),
    ids=lambda value: value.__name__[1:] if callable(value) else str(value),
)
def test_decoding_is_exact_for_keys_that_are(change, segment, device, monkeypatch):
    plan_with(monkeypatch, segment=segment)
    case = Case("adversarial", group=1, queries=3)
    inputs = inputs_of(case, seed=3)
    # Positive queries along one axis: then no order of summation changes which score is larger.
    inputs["query"] = torch.zeros_like(inputs["query"])
    inputs["query"][..., 0] = 1.5
    inputs["key"][..., 1:] = 0.0
    change(inputs["key"])
    if change not in (_infinite, _nan):
        inputs["key"][..., 1:] = 0.0
    check(case, device, inputs)


@on_kernel_device
def test_a_query_that_is_not_finite_gives_nan_and_leaves_others_alone(device):
    case = Case("broken-query", queries=3)
    inputs = inputs_of(case)
    inputs["query"][0, 1, 1, 5] = torch.nan
    output, _, bounds = run(case, device, inputs)
    assert output[0, 1, 1].isnan().all()
    assert not bounds.isnan().any()
    whole = torch.ones(1, 3, 3, dtype=torch.bool)
    whole[0, 1, 1] = False
    assert_close(output[whole], expect(case, inputs).output[whole], 1e-5)


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_broken_value_reaches_its_column_of_rows_that_attend_it_and_none_whose_rows_do_not(dtype, device):
    case = Case("broken-values", dtype, queries=5)
    inputs = inputs_of(case)
    for position in range(0, 120, 40):
        inputs["value"][:, :, position + 20, 3] = torch.nan
        inputs["value"][:, :, position + 31, 50] = torch.inf
    output, _, _ = run(case, device, inputs)
    expected = expect(case, inputs).output
    attended = expected.isnan()
    assert attended.any()
    assert output[attended].isnan().all()
    # It may reach other rows of its tile, in its own column.
    sound = [column for column in range(case.head_dim) if column not in (3, 50)]
    assert_close(output[..., sound], expected[..., sound], TOLERANCE[dtype])


@on_kernel_device
@pytest.mark.parametrize("seed", range(8 if THOROUGH else 2))
def test_bounds_contain_the_kept_mass_of_random_cases(seed, device):
    g = torch.Generator().manual_seed(200 + seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    case = Case(
        f"random-{seed}",
        dtype=pick(torch.float32, torch.bfloat16),
        batch=pick(1, 2),
        kv_heads=pick(1, 2),
        group=pick(1, 3, 4),
        queries=pick(1, 2, 5),
        keys=pick(70, 100, 130),
        head_dim=pick(64, 80),
        intervals=pick("causal", "sliding", "ragged"),
        budgets=pick("small", "per_head", "any"),
        softcap=pick(0.0, 4.0),
        sinks=pick(False, True),
        sink_keys=pick(0, 1, 4),
        recent_keys=pick(0, 1, 6),
    )
    inputs = inputs_of(case, seed)
    inputs["query"] *= pick(0.1, 1.0, 4.0)
    check(case, device, inputs)


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("change", [None, _huge, _tiny, _far_apart, _infinite, _nan], ids=lambda f: f and f.__name__)
def test_codes_written_in_place_bound_the_keys(change, dtype, device):
    case = Case("encode", dtype, batch=2, kv_heads=2, keys=60, head_dim=80, capacity=70)
    inputs = inputs_of(case)
    key = inputs["key"]
    center, spread = channel_moments(key, torch.zeros(2), torch.full((2,), 60))
    if change is not None and dtype == torch.float32:
        change(key)
    expected = encode_keys(key, center, spread)
    written = [
        t.new_full((*t.shape[:2], 70, *t.shape[3:]), -1 if t.is_floating_point() else 77).to(device) for t in expected
    ]
    first = torch.tensor([-3, 25], dtype=torch.int64, device=device)
    triton_encode_keys_(key.to(device), first, 40, KeyCodes(*written, center.to(device), spread.to(device)))
    codes, scale, residual = (t.cpu() for t in written)
    for b, begin, end in ((0, 0, 37), (1, 25, 60)):
        outside = torch.ones(70, dtype=torch.bool)
        outside[begin:end] = False
        assert (codes[b][:, outside] == 77).all()
        assert all((t[b][:, outside] == -1).all() for t in (scale, residual))
        own, bound, exact = codes[b, :, begin:end], residual[b, :, begin:end].double(), expected[2][b, :, begin:end]
        assert (own.int() - expected[0][b, :, begin:end].int()).abs().max() <= 1
        x = (key[b, :, begin:end].double() - center[b, :, None]) / spread[b, :, None]
        left_over = (x - scale[b, :, begin:end, None].double() * own.double()).norm(dim=-1)
        sound = x.isfinite().all(-1) & exact.isfinite()
        assert (left_over <= bound)[sound].all()
        # A code that lies between two may be rounded to either side.
        assert (bound <= 1.02 * exact.double() + 1e-6).all()
        assert torch.equal(bound.isinf(), exact.isinf())


@on_kernel_device
@pytest.mark.parametrize(("queries", "keys", "begin"), [(1, 96, 0), (1, 97, 5), (3, 100, 0), (17, 75, 3)])
def test_a_step_takes_its_keys_into_the_index_first(queries, keys, begin, device):
    case = Case("step", batch=2, kv_heads=2, queries=queries, keys=keys, value_dim=80, bounds=False)
    inputs = {name: None if x is None else x.to(device) for name, x in inputs_of(case).items()}
    # The second sequence is shorter: what lies beyond its end is not read.
    inputs["visible"][1, :, 1] -= 20
    inputs["visible"][..., 0] = begin
    inputs["budget"].fill_(9)
    end = inputs["visible"][:, -1, 1]
    start = torch.full_like(end, begin)
    problem = problem_of(**inputs, scale=0.2, origin=start[:, None].expand(-1, queries).contiguous(), most=9)
    options = {"value": inputs["value"], "start": start, "end": end, "backend": "triton"}
    results, indexes = [], []
    for new in (0, queries):
        means, codes = (KeyIndex.build(inputs["key"], kind, **options).tensors() for kind in ("means", "codes"))
        for b in range(2 if new else 0):  # what has not been taken in yet holds anything
            first = int(end[b]) - new
            for tensor in codes[:3]:
                tensor[b, :, first:] = 77
            for tensor in means:
                tensor[b, :, (first - begin) // 16 :] = 1e4
        asked = problem._replace(means=PageMeans(*means), key_index=codes, new=new)
        results.append(TopK().run(asked, "triton").output)
        indexes.append((*means, *codes))
    for b in range(2):
        length, pages = int(end[b]), (int(end[b]) - begin) // 16
        for number, (whole, kept) in enumerate(zip(*indexes, strict=True)):
            size = pages if number < 2 else length if number < 5 else None
            assert torch.equal(kept[b, :, :size], whole[b, :, :size])
    # Which keys are sampled, and so what is listed besides the best, may differ.
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


@triton.jit
def norms_kernel(tile, norms, D: tl.constexpr, M: tl.constexpr):
    columns = tl.load(tile + tl.arange(0, D)[:, None] * M + tl.arange(0, M)[None, :])
    tl.store(norms + tl.arange(0, M), column_norms(columns, tl.max(tl.abs(columns), axis=0)))


@on_kernel_device
def test_norms_are_no_smaller_than_they_are_whatever_their_size(device):
    tile = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    tile *= torch.tensor([1.0, 1e-38, 1e-44, 1e30, 3e37, 8e37, torch.inf, 0.0])
    tile[3, 0] = torch.nan
    found = torch.empty(8, device=device)
    norms_kernel[(1,)](tile.to(device), found, 64, 8)
    norms = tile.double().norm(dim=0)
    assert not found[[0, 6]].isfinite().any()
    assert (found.cpu().double() >= norms)[1:6].all()
    assert found[5] == torch.inf  # beyond float32
    assert (found.cpu()[1:5].double() <= 1.01 * norms[1:5]).all()
    assert found[7] == 0


@on_kernel_device
def test_codes_of_keys_whose_last_axis_is_not_dense_are_those_of_a_copy(device):
    key = torch.randn(1, 2, 20, 16)
    center, spread = channel_moments(key, torch.zeros(1), torch.full((1,), 20))
    strided = key.transpose(-1, -2).contiguous().to(device).transpose(-1, -2)
    first = torch.zeros(1, dtype=torch.int32, device=device)
    written = []
    for keys in (key.to(device), strided):
        codes = [torch.zeros_like(t).to(device) for t in encode_keys(key, center, spread)]
        triton_encode_keys_(keys, first, 20, KeyCodes(*codes, center.to(device), spread.to(device)))
        written.append(codes)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*written, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": MAX_DECODE_QUERIES + 1, "keys": 80}, f"at most {MAX_DECODE_QUERIES} queries"),
        ({"keys": 20}, "codes must be those of keys"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    case = Case("plain", keys=10)
    codes = codes_of(case, inputs_of(case))
    case = replace(case, **change)
    with pytest.raises(ValueError, match=message):
        run(case, "cpu", inputs_of(case), codes)


def test_a_plan_grows_with_the_budget_and_never_beyond_the_keys():
    for keys in (1, 7, 1000, 131072, 1 << 20):
        for budget in (1, 100, 5000, keys):
            plan = plan_for(Sizes(1, 8, 4, 1, keys, 128, 128), min(budget, keys))
            assert plan.segment * plan.splits >= min(budget, keys)
            assert plan.segment <= -(-(-(-keys // plan.keys) + 1) // plan.splits) * plan.keys
            assert plan.stride >= max(keys, plan.segment * plan.splits)
            assert plan.samples % plan.keys == 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_block_is_divided_among_one_wave_of_programs(architecture):
    dtype, laws = torch.bfloat16, [(2.0, 0.5), (4.0, 0.6), (1.0, 0.7), (8.0, 0.9), (1.0, 1.0)]
    for batch, kv_heads, group in itertools.product((1, 2, 8), (1, 2, 8), (1, 4, 7, 8)):
        for head_dim, keys, queries in itertools.product(
            (64, 128, 256), (1, 512, 8192, 16384, 31000, 1 << 20), (1, 32)
        ):
            sizes = Sizes(batch, kv_heads, group, queries, keys, head_dim, head_dim)
            for alpha, C in laws:
                plan = plan_for(sizes, budget_of(keys, alpha, C), dtype, architecture, False, True)
                assert 1 <= plan.splits <= MAX_SPLITS
                assert plan.splits * sizes.blocks(plan.rows) <= 3 * 132 or plan.splits == 1
                assert plan.tail_parts >= 1


@on_kernel_device
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_tensor_whose_last_axis_is_not_dense_is_copied(name, device):
    case = Case("strided", queries=2)
    inputs = inputs_of(case)
    codes = codes_of(case, inputs)
    inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    check(case, device, inputs, codes)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter():
    check_as_on_a_gpu(__file__)
