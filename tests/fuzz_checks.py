"""One fuzz case: a call of ``sparse_attention`` from a seed, held against the float64 reference row by row.

A row agrees if its output, log-sum-exp, kept mass and number of keys are the reference's to the rounding of float32
arithmetic on scores of that size. Where values are free, two scores may lie closer than rounding: a row also agrees if
it equals the reference of inputs that differ from the given ones by that much. Key blocks may weigh the same in float32
and not in float64: a row also agrees if the blocks it attends would be chosen if they weighed that much more.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz_inputs import Inputs, random_inputs
from operations import problem_of, reference_attention, selection_of

from nc_patch import AttentionResult, KeyIndex, NCConfig, sparse_attention
from nc_patch.budget import budget_of
from nc_patch.ops.problem import causal_intervals, visible_mask
from nc_patch.selections import Block
from nc_patch.selections.block.blocks import BLOCK_SIZES, QUERY_BLOCK_SIZES, SAMPLE_STRIDES, BlockChoice
from nc_patch.selections.block.definition import block_choice

# How often each kind is drawn in a thousand cases.
KINDS = {"moderate": 350, "extreme": 150, "broken": 150, "decode": 200, "gradient": 50, "refused": 100}
_EPS = 2.0**-24
_PERTURBED = 16
# Below this, exp(-87.34), a vectorised float32 exponential may be zero.
_SMALLEST_WEIGHT = 2.0**-126
# What the sum of a block's weights in float32 may be off by, in parts of it.
_SHARE_ROUNDING = 2.0**-18
# The logarithm below which a weight is zero in float32.
_VANISHED = math.log(2.0**-150)
_SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


@dataclass
class Call:
    """A call of ``sparse_attention``: its inputs and options, and the names of what an index is built for."""

    inputs: Inputs
    options: dict[str, Any]
    index: str | None = None
    means: bool = False

    def run(self, **more: Any) -> Any:
        """The call; ``more`` are further arguments."""
        i = self.inputs
        given = {"visible": i.visible, "origin": i.origin, "sinks": i.sinks, "scale": i.scale, "softcap": i.softcap}
        return sparse_attention(i.query, i.key, i.value, **given, **self.options, **self.indexes(), **more)

    def indexes(self) -> dict[str, KeyIndex]:
        """The indexes of the keys, built or extended in pieces."""
        return {
            name: self._built(kind)
            for name, kind in (("index", self.index), ("means", "means" if self.means else None))
            if kind is not None
        }

    def _built(self, kind: str) -> KeyIndex:
        key, value = self.inputs.key, self.inputs.value
        B, Lk = key.shape[0], key.shape[2]
        start = torch.zeros(B, dtype=torch.int32) if self.inputs.origin is None else self.inputs.origin[:, -1]
        options = {"start": start.clamp(min=0), "block_size": self.options.get("block_size", Block.size)}
        first = Lk // 2 if kind != "codes" else Lk  # codes depend on the first keys, in their tightness
        end = torch.full((B,), first, dtype=torch.int32)
        piece = key[:, :, :first], value[:, :, :first]
        index = KeyIndex.build(piece[0], kind, value=piece[1], end=end, capacity=max(first, 1), **options)
        if first < Lk:
            index.extend(key, Lk - first, torch.full((B,), Lk, dtype=torch.int32), value)
        return index


def random_call(kind: str, seed: int) -> Call:
    """The call of a kind that a seed stands for; not for ``"refused"``."""
    rng = random.Random(f"{kind} {seed}")
    selection = rng.choice(("topk", "topk", "topk", "window", "block", "dense"))
    if kind == "decode":
        return _decode_call(rng)
    sizes = {"queries": 60, "longest": 60} if kind == "gradient" else {}
    if selection == "block":
        sizes = {"queries": 260, "longest": 260}
    inputs = random_inputs(rng, values="moderate" if kind == "gradient" else kind, **sizes)
    return Call(inputs, random_options(rng, inputs, selection))


def _decode_call(rng: random.Random) -> Call:
    selection = rng.choice(("topk", "topk", "block"))
    while True:
        values = rng.choice(("moderate", "moderate", "extreme", "broken"))
        inputs = random_inputs(rng, values=values, queries=rng.choice((1, 1, 3, 32)), longest=200)
        one_origin = inputs.origin is None or bool((inputs.origin == inputs.origin[:, :1]).all())
        # An index is of one sequence a row, which begins among its keys.
        indexed = one_origin and inputs.shape[3] and (inputs.origin is None or bool((inputs.origin >= 0).all()))
        if indexed and (selection == "topk" or values != "extreme" or _pages_are_told_apart(inputs)):
            break
    call = Call(inputs, random_options(rng, inputs, selection))
    call.index = {"topk": "codes", "block": "pages"}[selection]
    if call.options.get("tail") == "mean":
        call.means = rng.random() < 0.7
        if rng.random() < 0.3:
            call.index = None
    return call


def _pages_are_told_apart(i: Inputs) -> bool:
    """Whether float32 holds the squares of the queries' elements, and tells the weights of the scores apart.

    It is by these that pages are chosen.
    """
    scale = i.query.shape[-1] ** -0.5 if i.scale is None else i.scale
    sizes = i.query.double().abs()[i.query != 0] * (i.scale or 1.0)
    key = i.key.double().repeat_interleave(i.query.shape[1] // i.key.shape[1], 1)
    scores = scale * (i.query.double() @ key.transpose(2, 3)).abs()
    return bool(((sizes > 2.0**-60) & (sizes < 2.0**60)).all()) and bool((scores[scores != 0] > 2.0**-16).all())


def random_options(rng: random.Random, inputs: Inputs, selection: str) -> dict[str, Any]:
    """Options of a call with a selection."""
    _, Hq, _, _, _ = inputs.shape
    alpha = lambda: rng.choice((0.1, 1.0, 2.0, 4.0, 1e-30, 1e30, rng.uniform(0.1, 9.0)))  # noqa: E731
    exponent = lambda: rng.choice((0.0, 0.5, 1.0, rng.random()))  # noqa: E731
    per_head = Hq > 0 and rng.random() < 0.3
    options: dict[str, Any] = {
        "selection": selection,
        "alpha": [alpha() for _ in range(Hq)] if per_head else alpha(),
        "C": [exponent() for _ in range(Hq)] if per_head and rng.random() < 0.5 else exponent(),
        "min_keys": rng.choice((1, 1, 1, rng.randint(1, 40), 10**9)),
        "sink_keys": rng.choice((4, 0, rng.randint(0, 20), 10**6)),
        "recent_keys": rng.choice((1, 0, rng.randint(0, 20), 10**6)),
        "backend": "torch",
    }
    if selection == "block":
        options |= {
            "block_size": rng.choice(BLOCK_SIZES),
            "query_block_size": rng.choice(QUERY_BLOCK_SIZES[1:]),
            "sample_stride": rng.choice(SAMPLE_STRIDES[2:5]),
            "min_mass": rng.choice((None, None, 0.5, 0.9)),
            "max_factor": rng.choice((1.0, 4.0, 1e300)),
        }
    elif selection == "topk":
        options["tail"] = rng.choice(("drop", "drop", "mean"))
    # Drawn apart, so that what a seed stands for stays as it was in all else.
    apart = random.Random(repr(options))
    options["dense_below"] = apart.choice((0, 0, 0, apart.randint(0, 260), 10**6))
    if selection == "block":
        options["local_keys"] = apart.choice((0, 0, 64, apart.randint(0, 260), 10**6))
        if apart.random() < 0.6:
            options["query_block_size"] = apart.choice(QUERY_BLOCK_SIZES)
            options["sample_stride"] = apart.choice((None, None, *SAMPLE_STRIDES))
    return options


def check(kind: str, seed: int) -> str | None:
    """Runs one case; what is wrong with it, or None."""
    if kind == "refused":
        from fuzz_refusals import check_refused

        return check_refused(seed)
    return check_call(random_call(kind, seed), f"{kind} {seed}", gradient=kind == "gradient")


def check_call(call: Call, name: str, *, gradient: bool = False) -> str | None:
    """Runs one call and holds it against the reference; what is wrong with it, or None."""
    before = [_bits(t) for t in (call.inputs.query, call.inputs.key, call.inputs.value)]
    said = _check_gradient(call) if gradient else _check_forward(call)
    if said is None and not all(
        torch.equal(old, _bits(t))
        for old, t in zip(before, (call.inputs.query, call.inputs.key, call.inputs.value), strict=True)
    ):
        said = "an input was written to"
    return None if said is None else f"{name}: {said}; {call.options} {call.inputs.described}"


def _check_forward(call: Call) -> str | None:
    if call.index == "codes":
        result = call.run(return_kept_mass="bounds")
        alone = call.run()
    elif call.options["selection"] == "topk" and call.means:
        result = call.run(return_stats=True)
        alone = call.run()
    else:
        result, alone = call.run(return_stats=True), call.run()
    B, Hq, _, Lq, _ = call.inputs.shape
    expected_shape = (B, Hq, Lq, call.inputs.value.shape[3])
    for output in (result.output, alone):
        if output.shape != expected_shape or output.dtype != call.inputs.query.dtype:
            return f"output is {output.dtype} {tuple(output.shape)}, not {expected_shape}"
    if not result.output.numel():
        return None
    wrong = _disagreements(call, result, alone)
    return None if wrong is None else wrong


def _disagreements(call: Call, result: AttentionResult, alone: torch.Tensor) -> str | None:
    left: torch.Tensor | None = None
    first = ""
    for expected in _references(call):
        said, rows = _compare(call, result, alone, expected)
        left = rows if left is None else left & rows
        first = first or said
        if not bool(left.any()):
            return None
        if call.inputs.exact and call.options["selection"] != "block":
            break
    assert left is not None
    return f"{int(left.sum())} rows disagree, first {left.nonzero()[0].tolist()}: {first}"


def _references(call: Call) -> Iterator[AttentionResult]:
    """The reference of the inputs, then of some that differ from them by rounding.

    Where values are not finite the output has three times the columns: those of the values, those of the values with
    zeros instead of what is not finite, and how much weight lies on what is not finite.
    """
    i, o = call.inputs, call.options
    B, Hq, _, Lq, Lk = i.shape
    visible = causal_intervals(B, Lq, Lk, "cpu") if i.visible is None else i.visible
    origin = visible[..., 0] if i.origin is None else i.origin
    selection = o["selection"]
    if call.index == "pages":
        selection = "pages"
        start = torch.zeros(B, dtype=torch.int32) if i.origin is None else i.origin[:, -1].clamp(min=0)
        origin = start[:, None].expand(B, Lq)
    if _is_dense(call):
        selection = "dense"
    per_head = [v if isinstance(v, list) else [v] * Hq for v in (o["alpha"], o["C"])]
    lengths = (visible[..., 1] - visible[..., 0]).tolist()
    budget = torch.tensor(
        [
            [[budget_of(n, *law, o["min_keys"], o["dense_below"]) for n in rows] for law in zip(*per_head, strict=True)]
            for rows in lengths
        ],
        dtype=torch.int32,
    ).view(B, Hq, Lq)
    settings = {
        "visible": visible, "origin": origin, "budget": budget, "selection": selection, "softcap": i.softcap,
        "scale": i.query.shape[-1] ** -0.5 if i.scale is None else i.scale, "sinks": i.sinks,
        "sink_keys": o["sink_keys"], "recent_keys": o["recent_keys"], "tail": o.get("tail") == "mean",
    }  # fmt: skip
    settings |= {name: o[name] for name in o if name in ("block_size", *Block.options)}
    value, finite = i.value, i.value.isfinite()
    if not bool(finite.all()):
        value = torch.cat((value, value.where(finite, 0.0), (~finite).to(value.dtype)), -1)
    yield reference_attention(i.query, i.key, value, **settings)
    if selection == "block":
        yield reference_attention(i.query, i.key, value, **settings, choice=_nudged_choice(call, settings))
    g = torch.Generator().manual_seed(0)
    for _ in range(_PERTURBED):
        noisy = [t.double() * (1 + 4e-7 * torch.randn(t.shape, generator=g)) for t in (i.query, i.key)]
        # So is the mass that blocks are found to keep, where they stop at one.
        if o.get("min_mass"):
            settings["min_mass"] = o["min_mass"] * (1 + 2e-6 * float(torch.randn(1, generator=g)))
        yield reference_attention(*noisy, value, **settings)


def _nudged_choice(call: Call, settings: dict[str, Any]) -> BlockChoice:
    """The blocks that the definition chooses if those that the call attends weigh more by what float32 may lose.

    Weights that float32 has no number for are zero.
    """
    i = call.inputs
    Hkv, Lk = i.key.shape[1:3]
    shows_weights = replace(i, value=torch.eye(Lk, dtype=i.value.dtype).expand(*i.key.shape[:2], Lk, Lk))
    with torch.no_grad():
        attended = replace(call, inputs=shows_weights).run() > 0
    key = i.key.double().repeat_interleave(i.query.shape[1] // Hkv, 1)
    scores = settings["scale"] * (i.query.double() @ key.transpose(2, 3))
    if i.softcap:
        scores = i.softcap * torch.tanh(scores / i.softcap)
    seen = visible_mask(settings["visible"], Lk)
    level = scores.masked_fill(~seen, -math.inf).logsumexp(-1, keepdim=True)
    scores = scores.masked_fill(scores - level < _VANISHED, -math.inf)
    rows = {name: settings[name] for name in ("visible", "budget", "origin")}
    block = selection_of("block", **settings)
    problem = problem_of(i.query, i.key, i.value, **rows)
    assert isinstance(block, Block)
    return block_choice(problem, scores + _SHARE_ROUNDING * attended, block)


def _is_dense(call: Call) -> bool:
    """Whether the call attends every key whatever its selection."""
    o = call.options
    return o["selection"] == "dense" or NCConfig([o["alpha"]], [o["C"]]).is_dense(0)


def _compare(
    call: Call, result: AttentionResult, alone: torch.Tensor, expected: AttentionResult
) -> tuple[str, torch.Tensor]:
    """What differs, and in which rows, bool ``[B, Hq, Lq]``."""
    said, wrong = "", torch.zeros(expected.output.shape[:3], dtype=torch.bool)
    relative, absolute = _tolerances(call)
    may_break = _sees_nan(call)[..., None]
    wanted, finite_part, faint = expected.output, expected.output, torch.tensor(False)
    if wanted.shape[-1] != alone.shape[-1]:
        wanted, finite_part, weight = wanted.chunk(3, -1)
        group = call.inputs.query.shape[1] // call.inputs.key.shape[1]
        broken = (~call.inputs.value.isfinite()).sum(2, keepdim=True).repeat_interleave(group, 1)
        faint = wanted.isnan() & (weight * torch.exp(-2 * relative[..., None]) < broken * _SMALLEST_WEIGHT)
    for name, found in (("output", result.output), ("output without statistics", alone)):
        close = _close(found.double(), wanted, absolute[..., None]) | (found.isnan() & may_break)
        close |= ~found.isfinite() & _may_be_spoilt(call)
        # A weight that float32 cannot tell from zero does not show what the key's value holds.
        bad = ~(close | (faint & _close(found.double(), finite_part, absolute[..., None]))).all(-1)
        said, wrong = said or _describe(name, bad, found, wanted), wrong | bad
    for name, of_logs in (("lse", True), ("kept_mass", False)):
        found = getattr(result, name)
        if found is None:
            continue
        wanted = getattr(expected, name)
        allowed = 1e-5 + relative * (1.0 if of_logs else 2.0)
        bad = ~_close(found.double(), wanted, allowed + 1e-6 * wanted.abs().nan_to_num(0, 0, 0))
        # Of a row that is not a number, these may be none either.
        bad &= (wanted.isfinite() | found.isfinite()) & ~(found.isnan() & may_break[..., 0])
        # Of logits that rounding may move by more than one, the mass means nothing.
        bad &= of_logs | (relative < 0.1)
        said, wrong = said or _describe(name, bad, found, wanted), wrong | bad
    if result.kept_mass_bounds is not None:
        lower, upper = result.kept_mass_bounds.double().unbind(-1)
        mass = expected.kept_mass
        bad = ~((lower <= mass + 1e-12) & (mass <= upper + 1e-12) | mass.isnan())
        said, wrong = said or _describe("kept_mass_bounds", bad, lower, mass), wrong | bad
    if result.attended is not None:
        bad = result.attended != expected.attended
        said, wrong = said or _describe("attended", bad, result.attended, expected.attended), wrong | bad
    return said, wrong


def _close(found: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    return same | ((found - wanted).abs() <= allowed)


def _describe(name: str, bad: torch.Tensor, found: torch.Tensor, wanted: torch.Tensor) -> str:
    if not bool(bad.any()):
        return ""
    place = tuple(bad.nonzero()[0].tolist())
    return f"{name} at {place} is {_short(found[place])}, not {_short(wanted[place])}"


def _short(values: torch.Tensor) -> Any:
    return [round(v, 6) if math.isfinite(v) and abs(v) > 1e-6 else v for v in values.flatten()[:6].tolist()]


def _tolerances(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding may move logits by, and outputs, float64 ``[B, Hq, Lq]`` each."""
    i = call.inputs
    group = i.query.shape[1] // i.key.shape[1]
    finite = lambda t: t.double().nan_to_num(0.0, 0.0, 0.0)  # noqa: E731
    norms = finite(i.key).norm(dim=-1)
    longest = (norms.amax(-1) if norms.shape[-1] else norms.sum(-1)).repeat_interleave(group, 1)
    logits = finite(i.query).norm(dim=-1) * longest[..., None]
    logits = logits * (i.query.shape[-1] ** -0.5 if i.scale is None else i.scale)
    sinks = 0.0 if i.sinks is None else float(i.sinks.abs().max())
    relative = 24 * _EPS * (logits + (i.softcap or 0.0) + sinks + 1)
    if call.options.get("tail") == "mean":
        # Means are rounded to the dtype of the keys.
        scale = i.query.shape[-1] ** -0.5 if i.scale is None else i.scale
        coarsest = scale * finite(i.query).abs().sum(-1) * (16 * _SMALLEST[i.query.dtype])
        half = 0.0 if i.query.dtype == torch.float32 else torch.finfo(i.query.dtype).eps
        relative = relative + 2 * half * (logits + 1) + coarsest
    of_weights = relative
    if i.exact and call.options.get("tail") != "mean":
        # Equal scores stay equal and others are far apart, however large they are.
        of_weights = relative.clamp(max=1e-3)
    sizes = finite(i.value).abs().flatten(2)
    largest = (sizes.amax(-1) if sizes.shape[-1] else sizes.sum(-1)).repeat_interleave(group, 1)[..., None]
    rounding = 2 * torch.finfo(i.query.dtype).eps
    # Of values near the smallest number there is, every one of a sum is rounded.
    smallest = _SMALLEST[i.query.dtype] + _SMALLEST[torch.float32] * (16 + i.key.shape[2])
    smallest += 16 * _SMALLEST[i.query.dtype] * (call.options.get("tail") == "mean")
    return relative, largest * (1e-5 + rounding + 2 * of_weights) + smallest


def _sees_nan(call: Call) -> torch.Tensor:
    """Rows that see a score which is not a number, bool ``[B, Hq, Lq]``.

    It counts as the highest, and whether one that is infinite and soft-capped goes before it is left open.
    """
    i = call.inputs
    B, _, _, Lq, Lk = i.shape
    scores = i.query.double() @ i.key.double().repeat_interleave(i.query.shape[1] // i.key.shape[1], 1).transpose(2, 3)
    visible = causal_intervals(B, Lq, Lk, "cpu") if i.visible is None else i.visible
    nothing = not i.softcap or call.options["selection"] != "topk"
    return (scores.isnan() & visible_mask(visible, Lk) & (not nothing)).any(-1)


def _may_be_spoilt(call: Call) -> torch.Tensor:
    """Columns that a value of a visible key may spoil for any row, bool ``[B, Hq, 1, Dv]``: in Triton rows share tiles.

    Decoding over pages is left out: there the rows of a tile attend the same keys.
    """
    i = call.inputs
    B, Hq, _, Lq, Lk = i.shape
    visible = causal_intervals(B, Lq, Lk, "cpu") if i.visible is None else i.visible
    seen = visible_mask(visible, Lk).any(2)[..., None]
    spoilt = (~i.value.isfinite() & seen).any(2, keepdim=True).repeat_interleave(Hq // i.key.shape[1], 1)
    return spoilt & (call.options["backend"] == "triton" and call.index != "pages")


def _check_gradient(call: Call) -> str | None:
    i = call.inputs
    tensors = [i.query, i.key, i.value] + ([] if i.sinks is None else [i.sinks])
    grads = []
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    names = ("query", "key", "value", "sinks")
    for name, leaf in zip(names, leaves, strict=False):
        setattr(i, name, leaf)
    output = call.run()
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    if output.numel():
        (output.double() * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    for name, tensor in zip(names, tensors, strict=False):
        setattr(i, name, tensor)
    if not output.numel():
        return None
    found = grads[0]
    closest = math.inf
    said = ""
    original = (i.query, i.key, i.value, i.sinks)
    i.query, i.key, i.value = doubles[:3]
    i.sinks = doubles[3] if len(doubles) > 3 else None
    for expected in _references(call):
        wanted = torch.autograd.grad((expected.output * weight).sum(), doubles, allow_unused=True)
        worst = 0.0
        for name, f, w in zip(names, found, wanted, strict=False):
            if f is None or f.shape != doubles[names.index(name)].shape:
                return f"no gradient of {name}"
            w = torch.zeros_like(doubles[names.index(name)]) if w is None else w
            # Against the largest of all: where the gradient cancels only rounding is left of it.
            size = max(float(x.norm()) for x in wanted if x is not None) + 1e-6
            error = float((f.double() - w).norm()) / size
            if not error < (1e-3 if original[0].dtype == torch.float32 else 5e-2):
                worst = max(worst, error) if math.isfinite(error) else math.inf
                said = said or f"the gradient of {name} is off by {error:.3g}"
        closest = min(closest, worst)
        if worst == 0.0:
            break
    i.query, i.key, i.value, i.sinks = original
    return said if closest > 0.0 else None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that compares NaN as equal to itself."""
    return tensor.detach().clone().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
