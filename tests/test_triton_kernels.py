"""The Triton kernels against the float64 reference: on a GPU where there is one, and in Triton's interpreter.

Whether kernels are interpreted is settled when they are imported, so the interpreter needs a process of its own:
``test_every_case_in_the_interpreter`` runs this file again in one. There, small tiles make short inputs cross many.
"""

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from gpu_semantics import check_as_on_a_gpu
from operations import (
    INTERPRETED,
    assert_close,
    on_kernel_device,
    problem_of,
    reference_attention,
    selection_of,
    topk_mask,
)

from nc_patch.ops.problem import causal_intervals
from nc_patch.ops.triton import launch as triton_launch
from nc_patch.selections import TopK, Window
from nc_patch.selections.topk import threshold as triton_threshold
from nc_patch.selections.topk.torch import forced_counts

KERNELS = ("topk", "window")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which short inputs cross many tiles in the interpreter."""
    small = triton_launch.Tiles(32, 16, 4, 1)
    chunked = replace(small, chunk=32)
    monkeypatch.setattr(triton_launch, "tiles_for", lambda _, dtype, *sizes: chunked if dtype.itemsize == 4 else small)


@dataclass(frozen=True)
class Case:
    """One input: its shape, what its queries may see, and its settings."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 1
    group: int = 2
    queries: int = 20
    keys: int = 53
    head_dim: int = 64
    value_dim: int | None = None
    intervals: str = "causal"
    budgets: str = "small"
    softcap: float = 0.0
    sinks: bool = False
    sink_keys: int = 4
    recent_keys: int = 1
    stats: bool = True
    transposed: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("bf16-d80-g3", torch.bfloat16, group=3, head_dim=80, queries=11),
    Case("fp16-d96-g5", torch.float16, group=5, head_dim=96, queries=7, sink_keys=0, recent_keys=0),
    Case("bf16-d128-g7-left-padding", torch.bfloat16, 2, group=7, queries=9, head_dim=128, intervals="left_padding"),
    Case("fp32-d192-narrow-values", head_dim=192, value_dim=128, group=1, queries=23),
    Case("bf16-d256-softcap-sinks", torch.bfloat16, head_dim=256, softcap=5.0, sinks=True, queries=16, keys=40),
    Case("fp32-softcap", softcap=2.0, group=1),
    Case("fp32-sinks-per-head-budgets", sinks=True, budgets="per_head", group=3, kv_heads=2, queries=10),
    Case("packed", intervals="packed", queries=53, group=1, sink_keys=2, recent_keys=3),
    Case("sliding-window", torch.bfloat16, intervals="sliding", queries=31, keys=70, group=1),
    Case("empty-and-ragged-rows", batch=2, intervals="ragged", budgets="any", group=1),
    Case("decode", torch.bfloat16, 2, kv_heads=2, group=4, queries=1, keys=97),
    Case("one-key", queries=1, keys=1, group=1),
    Case("full-budget", budgets="full", sinks=True, queries=17, keys=17),
    Case("forced-keys-fill-the-budget", sink_keys=30, recent_keys=40, budgets="any"),
    Case("no-stats-transposed", torch.bfloat16, 2, kv_heads=2, group=2, queries=9, stats=False, transposed=True),
]


def intervals_of(case: Case, generator: torch.Generator) -> torch.Tensor:
    """The visible intervals int32 ``[B, Lq, 2]`` of a case."""
    B, Lq, Lk = case.batch, case.queries, case.keys
    visible = causal_intervals(B, Lq, Lk, "cpu")
    if case.intervals == "causal":
        return visible
    visible = visible.clone()
    if case.intervals == "left_padding":
        for b in range(B):
            visible[b, :, 0] = 13 * b
    elif case.intervals == "packed":
        for border in (19, 37):
            visible[:, visible[0, :, 1] > border, 0] = border
    elif case.intervals == "sliding":
        visible[..., 0] = (visible[..., 1] - 24).clamp(min=0)
    elif case.intervals == "ragged":
        bounds = torch.randint(0, Lk + 1, (B, Lq, 2), generator=generator, dtype=torch.int32)
        visible = bounds.sort(-1).values.contiguous()
        visible[:, ::5] = 3
    visible[..., 1] = torch.maximum(visible[..., 0], visible[..., 1])
    return visible


def budgets_of(case: Case, visible: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Budgets int32 ``[B, Hq or 1, Lq]`` between 0 and n."""
    n = (visible[..., 1] - visible[..., 0])[:, None]
    if case.budgets == "full":
        return n.clone()
    if case.budgets == "small":
        return torch.minimum(n, 1 + (1.5 * n.double() ** 0.6).int())
    heads = case.kv_heads * case.group if case.budgets == "per_head" else 1
    share = torch.rand((n.shape[0], heads, n.shape[2]), generator=generator)
    return (share * (n + 1)).int().clamp(max=n.max()).minimum(n).contiguous()


def inputs_of(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Random inputs of a case, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    heads, value_dim = case.kv_heads * case.group, case.value_dim or case.head_dim

    def normal(*shape: int) -> torch.Tensor:
        if case.transposed:
            shape = (shape[0], shape[2], shape[1], shape[3])
        made = torch.randn(shape, generator=generator).to(case.dtype)
        return made.transpose(1, 2) if case.transposed else made

    visible = intervals_of(case, generator)
    return {
        "query": normal(case.batch, heads, case.queries, case.head_dim),
        "key": normal(case.batch, case.kv_heads, case.keys, case.head_dim),
        "value": normal(case.batch, case.kv_heads, case.keys, value_dim),
        "visible": visible,
        "budget": budgets_of(case, visible, generator),
        "sinks": torch.randn(heads, generator=generator) if case.sinks else None,
    }


def run(selection: str, case: Case, device: str, inputs: dict[str, torch.Tensor | None]):
    """(what the kernel returns, what the reference returns), both on the CPU."""
    scale = case.head_dim**-0.5
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    chosen = selection_of(selection, sink_keys=case.sink_keys, recent_keys=case.recent_keys)
    found = chosen.prefill_triton(problem_of(**moved, scale=scale, softcap=case.softcap, stats=case.stats))
    expected = reference_attention(
        **inputs,
        selection=selection,
        scale=scale,
        softcap=case.softcap,
        sink_keys=case.sink_keys,
        recent_keys=case.recent_keys,
    )
    output, lse, kept_mass = (None if x is None else x.cpu() for x in found[:3])
    return (output, lse, kept_mass), expected


def check(selection: str, case: Case, device: str, inputs: dict[str, torch.Tensor | None]) -> None:
    (output, lse, kept_mass), expected = run(selection, case, device, inputs)
    assert output.dtype == case.dtype
    assert_close(output, expected.output, TOLERANCE[case.dtype])
    if case.stats:
        assert_close(lse, expected.lse, 1e-5)
        assert_close(kept_mass, expected.kept_mass, 1e-5)
    else:
        assert lse is None
        assert kept_mass is None


@on_kernel_device
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("selection", KERNELS)
def test_kernel_equals_the_reference(selection, case, device):
    check(selection, case, device, inputs_of(case))


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_topk_attends_exactly_the_reference_set_where_scores_tie(dtype, device):
    # Scores on a small integer grid are exact in every dtype, and most of them tie.
    case = Case("grid", dtype, queries=30, keys=64, group=1, kv_heads=2, budgets="any", sink_keys=2, recent_keys=2)
    inputs = inputs_of(case)
    generator = torch.Generator().manual_seed(1)
    for name in ("query", "key"):
        inputs[name] = torch.zeros_like(inputs[name])
        inputs[name][..., :3] = torch.randint(-1, 2, (*inputs[name].shape[:3], 3), generator=generator).to(dtype)
    # Values that are the identity show which keys were attended.
    inputs["value"] = torch.eye(64, dtype=dtype).expand(1, 2, 64, 64)
    (output, _, _), _ = run("topk", case, device, inputs)
    scores = inputs["query"].double() @ inputs["key"].double().transpose(-1, -2)
    expected = topk_mask(scores, inputs["visible"], inputs["budget"], case.sink_keys, case.recent_keys)
    assert torch.equal(output > 0, expected)
    assert torch.equal((output > 0).sum(-1), inputs["budget"].expand(1, 2, 30).long())


def _all_equal(key):
    key.fill_(0.5)


def _all_zero(key):
    key.zero_()
    key[:, :, ::2] *= -1


def _huge(key):
    key *= 1e18


def _tiny(key):
    key *= 1e-38


def _outlier(key):
    key[:, :, 7] = 1e6


def _far_apart(key):
    key *= torch.logspace(-30, 16, key.shape[2])[:, None]


def _infinite(key):
    key[:, :, 11] = torch.inf
    key[:, :, 12] = -torch.inf
    key[:, :, 30] = torch.inf


def _nan(key):
    key[:, :, 11] = torch.nan
    key[:, :, 40] = torch.nan


@on_kernel_device
@pytest.mark.parametrize(
    "spoil", [_all_equal, _all_zero, _huge, _tiny, _outlier, _far_apart, _infinite, _nan], ids=lambda f: f.__name__[1:]
)
def test_topk_ends_and_is_exact_for_keys_that_are(spoil, device):
    case = Case("spoiled", group=1, stats=False)
    inputs = inputs_of(case, seed=3)
    # Positive queries along one axis: then no order of summation changes which score is larger.
    inputs["query"] = torch.zeros_like(inputs["query"])
    inputs["query"][..., 0] = 1.5
    inputs["key"][..., 1:] = 0.0
    spoil(inputs["key"])
    if spoil not in (_infinite, _nan):
        inputs["key"][..., 1:] = 0.0
    check("topk", case, device, inputs)


@pytest.mark.skipif(not INTERPRETED, reason="passes are counted in the interpreter")
@pytest.mark.parametrize(
    ("spoil", "budgets", "most"),
    [(None, "full", 0), (None, "small", 9), (_all_equal, "small", 4), (_tiny, "small", 25), (_far_apart, "any", 25)],
    ids=["full-budget", "normal", "all-equal", "tiny", "far-apart"],
)
def test_counting_passes_are_few_and_bounded(spoil, budgets, most, device, monkeypatch):
    passes = []
    count_range = triton_threshold.count_range
    monkeypatch.setattr(triton_threshold, "count_range", lambda *args: passes.append(1) or count_range(*args))
    case = Case("one-program", group=1, queries=30, keys=90, budgets=budgets, sink_keys=0, recent_keys=0, stats=False)
    inputs = inputs_of(case)
    if spoil is not None:
        spoil(inputs["key"])
    check("topk", case, device, inputs)
    assert (len(passes) > 0) == (budgets != "full")
    assert len(passes) <= most


@on_kernel_device
def test_nan_and_infinity_rank_together_and_softcap_makes_infinity_finite(device):
    case = Case("mixed", group=1, softcap=3.0, stats=False, budgets="small")
    inputs = inputs_of(case)
    inputs["query"] = torch.zeros_like(inputs["query"])
    inputs["query"][..., 0] = 1.0
    for position, score in ((3, torch.inf), (9, torch.nan), (20, torch.inf), (33, -torch.inf)):
        inputs["key"][:, :, position] = 0.0
        inputs["key"][:, :, position, 0] = score
    check("topk", replace(case, sink_keys=0, recent_keys=0), device, inputs)


@on_kernel_device
@pytest.mark.parametrize("selection", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_broken_value_reaches_the_rows_that_attend_it_and_none_of_another_program(selection, dtype, device):
    case = Case("broken-values", dtype, group=1, queries=40, head_dim=80, stats=False)
    inputs = inputs_of(case)
    inputs["value"][:, :, 48, 3] = torch.nan
    inputs["value"][:, :, 51, 50] = torch.inf
    (output, _, _), expected = run(selection, case, device, inputs)
    attending = expected.output.isnan()
    assert 0 < int(attending.sum()) < 2 * case.queries
    architecture = triton_launch.architecture_of(torch.device(device))
    rows = triton_launch.tiles_for(architecture, dtype, case.head_dim, case.head_dim, case.queries).rows
    # The first row that sees the first of them: rows of its program may be NaN in the column, all others are right.
    reached = 48 - (case.keys - case.queries)
    assert output.isfinite()[attending].sum() == 0
    assert_close(
        output[:, :, : reached // rows * rows], expected.output[:, :, : reached // rows * rows], TOLERANCE[dtype]
    )
    untouched = [d for d in range(case.head_dim) if d not in (3, 50)]
    assert_close(output[..., untouched], expected.output[..., untouched], TOLERANCE[dtype])


@on_kernel_device
@pytest.mark.parametrize("selection", KERNELS)
def test_keys_between_what_the_rows_of_a_program_see_change_nothing(selection, device):
    case = Case("apart", group=1, queries=20, budgets="small")
    inputs = inputs_of(case)
    inputs["visible"][:, :7] = torch.tensor([2, 9])
    inputs["visible"][:, 7:9] = torch.tensor([40, 40])
    inputs["visible"][:, 9:14] = torch.tensor([12, 26])
    inputs["visible"][:, 14:] = torch.tensor([26, 33])
    inputs["budget"] = budgets_of(case, inputs["visible"], torch.Generator())
    expected, reference = run(selection, case, device, inputs)
    assert_close(expected[0], reference.output, TOLERANCE[case.dtype])
    for unseen in (slice(0, 2), slice(9, 12), slice(33, None)):
        inputs["key"][:, :, unseen] = torch.nan
        inputs["value"][:, :, unseen] = torch.nan
    actual, _ = run(selection, case, device, inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert actual[0].isfinite().all()


@on_kernel_device
@pytest.mark.parametrize("selection", KERNELS)
def test_keys_outside_the_interval_change_nothing(selection, device):
    case = Case("hidden", group=1, batch=2, intervals="left_padding")
    inputs = inputs_of(case)
    expected, _ = run(selection, case, device, inputs)
    inputs["key"][1, :, :13] = torch.nan
    inputs["value"][1, :, :13] = torch.nan
    actual, _ = run(selection, case, device, inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@on_kernel_device
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_equal_the_reference(seed, device):
    generator = torch.Generator().manual_seed(100 + seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    keys = int(torch.randint(1, 100, (1,), generator=generator))
    case = Case(
        f"random-{seed}",
        dtype=pick(torch.float32, torch.bfloat16, torch.float16),
        batch=pick(1, 2),
        kv_heads=pick(1, 2),
        group=pick(1, 2, 3),
        queries=min(keys, int(torch.randint(1, 25, (1,), generator=generator))),
        keys=keys,
        head_dim=pick(64, 80, 96, 128),
        intervals=pick("causal", "sliding", "ragged"),
        budgets=pick("small", "per_head", "any"),
        softcap=pick(0.0, 4.0),
        sinks=pick(False, True),
        sink_keys=pick(0, 1, 4),
        recent_keys=pick(0, 1, 6),
    )
    for selection in KERNELS:
        check(selection, case, device, inputs_of(case, seed))


@on_kernel_device
def test_no_query_gives_an_empty_output(device):
    case = Case("nothing", queries=1)
    inputs = inputs_of(case)
    for name, empty in (("query", (1, 2, 0, 64)), ("visible", (1, 0, 2)), ("budget", (1, 1, 0))):
        inputs[name] = torch.zeros(empty, dtype=inputs[name].dtype, device=device)
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    output = selection_of("topk").prefill_triton(problem_of(**moved, stats=True)).output
    assert output.shape == (1, 2, 0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 20, 64).double()}, "query must be one of bfloat16, float16, float32"),
        ({"value": torch.zeros(1, 1, 53, 64).half()}, "value must have query's dtype"),
        ({"key": torch.zeros(1, 53, 64)}, r"key must be \[batch, heads, length, head_dim\]"),
        ({"key": torch.zeros(1, 1, 50, 64)}, r"key must be \[B, Hkv, Lk, D\] and value"),
        ({"query": torch.zeros(1, 3, 20, 64), "key": torch.zeros(1, 2, 53, 64)}, r"and value \[B, Hkv, Lk, Dv\]"),
        ({"visible": torch.zeros(1, 20, 2)}, "visible must be int32"),
        ({"origin": torch.zeros(1, 20)}, "origin must be int32"),
        ({"budget": torch.zeros(1, 5, 20, dtype=torch.int32)}, "budget must be int32"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[2\] on cpu"),
        ({"value": torch.zeros(1, 1, 53, 320)}, "at most 256, got 64 and 320"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    problem = problem_of(**inputs_of(Case("plain")))._replace(**change)
    for chosen in (TopK(tail="drop"), Window()):
        with pytest.raises(ValueError, match=message):
            chosen.prefill_triton(problem)


def test_the_cases_leave_keys_to_choose_by_score():
    # Guards the cases themselves: most must leave room in the budget beyond the forced keys, and keys to drop.
    searching = 0
    for case in CASES:
        inputs = inputs_of(case)
        visible, budget = inputs["visible"], inputs["budget"]
        forced = sum(forced_counts(budget, case.sink_keys, case.recent_keys))
        n = (visible[..., 1] - visible[..., 0])[:, None]
        searching += bool(((budget > forced) & (budget < n)).any())
    assert searching >= len(CASES) - 3


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter():
    check_as_on_a_gpu(__file__)
