"""Random calls of ``sparse_attention`` from seeds, held against the float64 reference row by row.

A row agrees if its output, log-sum-exp, kept mass and number of keys are the reference's to the rounding of float32
arithmetic on scores of that size. Two scores, or the weights of two blocks of keys, may lie closer than rounding: a row
also agrees if it equals the reference of inputs that differ from the given ones by that much.

A few seeds run every time, with ``-m wide`` as many as FUZZ_CASES says, from FUZZ_FIRST on. Below, what calls with
extreme values once showed.
"""

import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from attention_cases import COLUMN_LAYOUTS, HARD, LAYOUTS, PAGE_KINDS, WAYS, Case, check, random_case
from operations import INSTALLED, INTERPRETED, problem_of_case
from torch.nn.functional import scaled_dot_product_attention

from nc_patch import AttentionResult, KeyIndex, sparse_attention
from nc_patch.ops.reference import raw_scores

CASES, FIRST = int(os.environ.get("FUZZ_CASES", "2000")), int(os.environ.get("FUZZ_FIRST", "2000000"))
# How often each kind is drawn in a thousand cases.
KINDS = {"forward": 500, "broken": 150, "decode": 300, "gradient": 50}
_PREFILL = ("topk", "drop", "drop", "window", "block", "dense")
_DECODE = ("codes", "codes", "codes with means", "pages", "topk")
_PERTURBED = 16


class Call(NamedTuple):
    """A call of ``sparse_attention``: its case, the way in which it attends, and whether it has an index of means."""

    case: Case
    way: str
    means: bool = False

    def run(self, backend: str, **more: Any) -> Any:
        """The call; ``more`` are further arguments."""
        case, kinds = self.case, {"index": WAYS[self.way].index, "means": "means" if self.means else None}
        tensors = {name: getattr(case, name) for name in ("query", "key", "value", "visible", "origin", "sinks")}
        scoring = {"scale": case.scale, "softcap": case.softcap or None, "selection": case.selection(self.way)}
        indexes = {name: self.built(kind) for name, kind in kinds.items() if kind is not None}
        if self.means:
            del tensors["origin"]  # by default that of the means
        return sparse_attention(**tensors, **scoring, **indexes, **case.law, backend=backend, **more)

    def built(self, kind: str) -> KeyIndex:
        """An index of the keys, extended by half of them; codes depend on the first keys, in their tightness."""
        key, value, start = self.case.key, self.case.value, self.case.origin[:, -1]
        Lk = key.shape[2]
        first = Lk // 2 if kind != "codes" else Lk
        options = {"start": start, "end": torch.full_like(start, first), "block_size": self.case.options["size"]}
        index = KeyIndex.build(key[:, :, :first], kind, value=value[:, :, :first], capacity=max(first, 1), **options)
        if first < Lk:
            index.extend(key, Lk - first, torch.full_like(start, Lk), value)
        return index

    def spoil(self) -> None:
        """Writes NaN over keys and values that nothing may read: that no query sees, and no index or page holds."""
        case = self.case
        if WAYS[self.way].index or self.means:
            unread = (torch.arange(case.key.shape[2]) < case.origin[:, -1:])[:, None, :, None]
        elif case.query.numel():
            unread = case.unread(self.way)
        else:
            return
        for tensor in (case.key, case.value):
            if 0 not in tensor.stride():
                tensor.masked_fill_(unread, torch.nan)

    @property
    def references(self) -> int:
        """How many references a row may equal."""
        return 1 if self.case.exact and WAYS[self.way].selection != "block" else 1 + _PERTURBED

    def reference(self, number: int) -> AttentionResult:
        """The reference of the inputs, or with a number above 0 of some that differ from them by rounding."""
        case = self.case
        if number:
            g = torch.Generator().manual_seed(number)
            noisy = (t.double() * (1 + 4e-7 * torch.randn(t.shape, generator=g)) for t in (case.query, case.key))
            case = replace(case, query=next(noisy), key=next(noisy))
            if mass := case.options["min_mass"]:  # so is the mass that blocks are found to keep, where they stop at one
                case.options = case.options | {"min_mass": mass * (1 + 2e-6 * float(torch.randn(1, generator=g)))}
        return case.reference(self.way)


def fuzz(kind: str, seed: int) -> str | None:
    """Runs one case, of ``KINDS``, or in Triton's interpreter of ``WAYS``; what is wrong with it, or None."""
    name, rng = f"{kind} {seed}", random.Random(f"{kind} {seed}")
    way = kind if kind in WAYS else rng.choice(_DECODE if kind == "decode" else _PREFILL)
    decode = kind == "decode" or WAYS[way].index is not None
    options: dict[str, Any] = {"dtype": None, "decode": decode, "odd": True}
    if kind in WAYS:
        options |= {"longest": 70, "queries": rng.choice((1, 1, 3)) if decode else 24, "layouts": LAYOUTS}
        cases = (random_case(f"{name} {number}", **options) for number in range(1000))
        case = next(case for case in cases if 0 < case.query.shape[:2].numel() <= 12 and case.key.shape[2])
    else:
        broken = kind == "broken" or (kind == "decode" and rng.random() < 0.2)
        longest = {"decode": 200, "gradient": 60}.get(kind, 260 if way == "block" else 150)
        queries = rng.choice((1, 1, 3, 32)) if decode else longest
        options |= {"longest": longest, "queries": queries, "layouts": LAYOUTS + COLUMN_LAYOUTS, "broken": broken}
        case = random_case(name, **options)
    call = Call(case, way, decode and WAYS[way].tail == "mean" and (way == "topk" or rng.random() < 0.7))
    if kind != "gradient":
        call.spoil()
    tensors = case.query, case.key, case.value
    before = [tensor.clone() for tensor in tensors]
    if kind in WAYS:
        said = _check_interpreted(call, seed)
    elif kind == "gradient":
        said = _check_gradient(call)
    else:  # in the kernels a broken value may reach other rows of its tile
        said = _check_forward(call, INSTALLED[:1] if broken else INSTALLED)
    if not all(torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)) for a, b in zip(before, tensors, strict=True)):
        said = said or "an input was written to"
    of = f"{case.law} {case.selection(way)} {[tuple(tensor.shape) for tensor in tensors]} {tensors[0].dtype}"
    return said and f"{name}: {said}; {of}"


def _check_interpreted(call: Call, seed: int) -> str | None:
    """A case of the Triton kernels in the interpreter, as on a GPU, with tiles of which two in three are small."""
    from gpu_semantics import GpuSemantics
    from interpreted import small_sizes

    with ExitStack() as stack:
        if seed % 3:
            small_sizes(stack.enter_context(pytest.MonkeyPatch.context()))
        gpu = stack.enter_context(GpuSemantics(seed).active())
        said = _check_forward(call, ("triton",))
    return said or "; ".join(gpu.take_findings()) or None


def _check_forward(call: Call, backends: tuple[str, ...]) -> str | None:
    reference = cache(call.reference)
    for backend in backends:
        if said := _check_backend(call, backend, reference):
            return f"{backend}: {said}"
    return None


def _check_backend(call: Call, backend: str, reference: Callable[[int], AttentionResult]) -> str | None:
    wanted = {"return_kept_mass": "bounds"} if WAYS[call.way].index == "codes" else {"return_stats": True}
    alone, result = call.run(backend), call.run(backend, **wanted)
    shape = (*call.case.query.shape[:3], call.case.value.shape[3])
    for output in (result.output, alone):
        if output.shape != shape or output.dtype != call.case.query.dtype:
            return f"output is {output.dtype} {tuple(output.shape)}, not {shape}"
    if not alone.numel():
        return None
    left, first = torch.ones(shape[:3], dtype=torch.bool), ""
    for number in range(call.references):
        wrong, said = _compare(call, result, alone, reference(number))
        left, first = left & wrong, first or said
        if not left.any():
            return None
    return f"{int(left.sum())} rows disagree, first {left.nonzero()[0].tolist()}: {first}"


def _compare(
    call: Call, result: AttentionResult, alone: torch.Tensor, expected: AttentionResult
) -> tuple[torch.Tensor, str]:
    """In which rows something differs, bool ``[B, Hq, Lq]``, and what."""
    relative, absolute = _tolerances(call)
    figures: dict[str, tuple[Any, torch.Tensor, Any]] = {
        "output": (result.output, expected.output, absolute[..., None]),
        "output without statistics": (alone, expected.output, absolute[..., None]),
        "lse": (result.lse, expected.lse, 1e-5 + relative + 1e-6 * expected.lse.abs()),
        "kept_mass": (result.kept_mass, expected.kept_mass, 1e-5 + 2 * relative),
        "attended": (result.attended, expected.attended, 0.0),
    }
    if result.kept_mass_bounds is not None:
        within = expected.kept_mass.clamp(*result.kept_mass_bounds.double().unbind(-1))
        figures["kept mass within its bounds"] = (within, expected.kept_mass, 1e-12)
    wrong, said = torch.zeros(alone.shape[:3], dtype=torch.bool), ""
    for name, (found, wanted, allowed) in figures.items():
        if found is None:
            continue
        found, wanted = found.double(), wanted.double()
        same = (found == wanted) | ((found - wanted).abs() <= allowed) | (found.isnan() & wanted.isnan())
        if name in ("lse", "kept_mass"):  # of a row that is not a number, these may be none either
            same |= ~found.isfinite() & ~wanted.isfinite()
        bad = ~(same.all(-1) if same.ndim == 4 else same)
        if bad.any() and not said:
            place = tuple(bad.nonzero()[0].tolist())
            said = f"{name} is {found[place].flatten()[:6].tolist()}, not {wanted[place].flatten()[:6].tolist()}"
        wrong |= bad
    return wrong, said


def _tolerances(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding may move logits by, and outputs, float64 ``[B, Hq, Lq]`` each."""
    case, is_tail = call.case, WAYS[call.way].tail == "mean"
    query, key, value = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (case.query, case.key, case.value))
    repeat = lambda t: t.repeat_interleave(query.shape[1] // key.shape[1], 1)[..., None]  # noqa: E731
    longest = repeat(torch.cat((key.norm(dim=-1), key.new_zeros(*key.shape[:2], 1)), -1).amax(-1))
    largest = repeat(torch.cat((value.abs().flatten(2), value.new_zeros(*value.shape[:2], 1)), -1).amax(-1))
    logits = query.norm(dim=-1) * longest * case.scale
    eps = torch.finfo(case.query.dtype).eps
    sinks = 0.0 if case.sinks is None else float(case.sinks.abs().max())
    relative = 24 * 2.0**-24 * (logits + case.softcap + sinks + 1)
    if is_tail and case.query.dtype != torch.float32:  # means are rounded to the dtype of the keys
        relative = relative + 2 * eps * (logits + 1)
    # Equal scores stay equal and others are far apart, however large they are.
    of_weights = relative.clamp(max=1e-3) if case.exact and not is_tail else relative
    return relative, largest * (1e-5 + 2 * eps + 2 * of_weights) + 2.0**-24


def _check_gradient(call: Call) -> str | None:
    names = [name for name in ("query", "key", "value", "sinks") if getattr(call.case, name) is not None]
    tensors = [getattr(call.case, name) for name in names]
    with_tensors = lambda given: call._replace(case=replace(call.case, **dict(zip(names, given, strict=True))))  # noqa: E731
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = with_tensors(leaves).run("torch")
    if not output.numel():
        return None
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output.double() * weight).sum().backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    said = ""
    allowed = 1e-3 if output.dtype == torch.float32 else 5e-2
    for number in range(call.references):
        expected = (with_tensors(doubles).reference(number).output * weight).sum()
        wanted = torch.autograd.grad(expected, doubles, allow_unused=True, materialize_grads=True)
        # Against the largest of all: where the gradient cancels only rounding is left of it.
        size = max(float(each.norm()) for each in wanted) + 1e-6
        errors = [float((leaf.grad.double() - each).norm()) / size for leaf, each in zip(leaves, wanted, strict=True)]
        if all(error < allowed for error in errors):
            return None
        said = said or f"gradients of {names} are off by {errors}"
    return said


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_equal_the_reference(kind):
    said = [fuzz(kind, seed) for seed in range(300)]
    assert [each for each in said if each is not None] == []


@pytest.mark.wide
@pytest.mark.parametrize("kind", WAYS if INTERPRETED else KINDS)
def test_many_more_random_calls(kind):
    count = CASES * KINDS.get(kind, 1) // 1000  # the interpreter takes half a minute for two
    said = [fuzz(kind, seed) for seed in range(FIRST, FIRST + count)]
    assert [each for each in said if each is not None] == []


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("forward", lambda run, q, k, v, **options: run(q, k * 1.01, v, **options)),
        ("forward", lambda run, q, k, v, **options: run(q, k, v * 1.01, **options)),
        ("broken", lambda run, q, k, v, **options: run(q, k, v.nan_to_num(0, 0, 0), **options)),
        ("gradient", lambda run, q, k, v, **options: run(q, k, v * 1.1, **options)),
        ("decode", lambda run, q, k, v, **options: run((q[:1, :1, :1, :1].neg_(), q)[1], k, v, **options)),
    ],
    ids=["key", "value", "no number", "gradient", "written"],
)
def test_what_is_wrong_is_noticed(kind, wrong, monkeypatch):
    run = sparse_attention
    changed = lambda query, key, value, **options: wrong(run, query, key, value, **options)  # noqa: E731
    monkeypatch.setattr("test_fuzz.sparse_attention", changed)
    assert sum(fuzz(kind, seed) is not None for seed in range(36)) > 6


@pytest.mark.parametrize("kind", HARD)
def test_topk_chooses_the_references_keys_whatever_they_are_and_codes_bound_the_kept_mass(kind):
    for seed in range(12):
        case = random_case(f"{kind} {seed}", decode=True)
        pad = -case.query.shape[-1] % 16 if seed % 3 else 0  # whole vectors of codes, or keys themselves
        case.query, case.key = (torch.nn.functional.pad(t, (0, pad)) for t in (case.query, case.key))
        if kind in ("all equal", "far from zero", "heavy tails"):
            case.query = (case.query * 4).round()
        case.key = HARD[kind](case.key)
        # What float32 rounds off a large logit; of still larger ones a single key has all of the softmax.
        largest = float((case.scale * raw_scores(problem_of_case(case))).abs().max())
        tolerance = 1e-5 + (5e-7 * largest if largest < 1e5 else 0.0)
        new = min(seed % 6, case.query.shape[2], int((case.visible[:, -1, 1] - case.visible[:, 0, 0]).min()))
        expected = case.reference("codes")
        for backend in INSTALLED:
            given = {"expected": expected, "stats": False, "tolerance": tolerance}
            for bounds in (False, True):
                check("codes", case, backend, new=max(new, 0), bounds=bounds, **given)
            check("drop", case, backend, **given)


@pytest.mark.parametrize("kind", PAGE_KINDS)
def test_pages_are_chosen_and_attended_as_defined_whatever_the_keys_are(kind):
    for seed in range(24):
        case = random_case(seed, decode=True)
        case.key = kind(case.key)
        expected, new = case.reference("pages"), seed % 4 if bool((case.origin == 0).all()) else 0
        for backend in INSTALLED:
            check("pages", case, backend, expected, new, stats=False, tolerance=1e-4)


@pytest.mark.parametrize("selection", ["topk", "window", "block", "dense"])
def test_a_scale_above_one_does_not_overflow_the_query(selection):
    query, key = torch.full((1, 1, 40, 2), 2.0**126), torch.randn(1, 1, 40, 2) * 2.0**-137
    value = torch.randn(1, 1, 40, 4)
    output = sparse_attention(query, key, value, alpha=1.0, C=1.0, selection=selection, scale=2.0**10)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, scale=2.0**10)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("what", [-torch.inf, torch.nan])
def test_a_row_of_blocks_without_a_finite_score_is_no_number(what, stats):
    query, key, value = torch.ones(1, 1, 100, 1), torch.randn(1, 1, 100, 1), torch.randn(1, 1, 100, 4)
    key[:, :, :50] = what
    options = {"selection": "block", "alpha": 1.0, "C": 0.99, "min_keys": 100, "backend": "torch"}
    found = sparse_attention(query, key, value, return_stats=stats, **options)
    output = found.output if stats else found
    assert output[:, :, :50].isnan().all()
    assert output[:, :, 50:].isnan().all() == (what != -torch.inf)
