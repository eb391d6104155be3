"""One fuzz case: a call of ``sparse_attention`` from a seed, held against the float64 reference row by row.

A row agrees if its output, log-sum-exp, kept mass and number of keys are the reference's to the rounding of float32
arithmetic on scores of that size. Two scores, or the weights of two blocks of keys, may lie closer than rounding: a row
also agrees if it equals the reference of inputs that differ from the given ones by that much.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from fuzz_inputs import COLUMN_LAYOUTS, LAYOUTS, Inputs, random_inputs
from operations import reference_attention

from nc_patch import AttentionResult, KeyIndex, NCConfig, sparse_attention
from nc_patch.budget import budget_of
from nc_patch.ops.backends import has_numba
from nc_patch.ops.problem import causal_intervals, visible_mask
from nc_patch.selections import Block
from nc_patch.selections.block.blocks import BLOCK_SIZES, QUERY_BLOCK_SIZES, SAMPLE_STRIDES

# How often each kind is drawn in a thousand cases.
KINDS = {"forward": 500, "broken": 150, "decode": 300, "gradient": 50}
# What is asked of the Triton kernels: a selection and its tail, or the index by which it decodes.
KERNELS = ("topk", "window", "dense", "block", "tail", "codes", "pages", "means")
_PERTURBED = 16


class Call(NamedTuple):
    """A call of ``sparse_attention``: inputs and options, the kind of its index, and whether it has one of means."""

    inputs: Inputs
    options: dict[str, Any]
    index: str | None = None
    means: bool = False

    def run(self, **more: Any) -> Any:
        """The call; ``more`` are further arguments."""
        given = {name: tensor for name, tensor in self.inputs._asdict().items() if name != "exact"}
        indices = {"index": self.index, "means": "means" if self.means else None}
        given |= {name: self._built(kind) for name, kind in indices.items() if kind is not None}
        return sparse_attention(**given, **self.options, **more)

    @property
    def visible(self) -> torch.Tensor:
        """The interval of keys that each query sees."""
        B, _, Lq, _ = self.inputs.query.shape
        causal = causal_intervals(B, Lq, self.inputs.key.shape[2], "cpu")
        return causal if self.inputs.visible is None else self.inputs.visible

    @property
    def start(self) -> torch.Tensor:
        """Where the sequence of an index begins, int ``[B]``."""
        B, origin = len(self.inputs.query), self.inputs.origin
        return torch.zeros(B, dtype=torch.int32) if origin is None else origin[:, -1]

    @property
    def references(self) -> int:
        """How many references a row may equal."""
        return 1 if self.inputs.exact and self.options["selection"] != "block" else 1 + _PERTURBED

    def spoil(self) -> None:
        """Writes NaN over keys and values that nothing may read: that no query sees, and no index or page holds."""
        at = torch.arange(self.inputs.key.shape[2])
        if self.index or self.means:
            unread = at < self.start[:, None]
        elif self.options.get("tail") == "mean" or not self.inputs.query.numel():
            return
        else:
            unread = ~visible_mask(self.visible, len(at)).any(2)[:, 0]
        for tensor in (self.inputs.key, self.inputs.value):
            if 0 not in tensor.stride():
                tensor.masked_fill_(unread[:, None, :, None], torch.nan)

    def _built(self, kind: str) -> KeyIndex:
        """An index of the keys, extended by half of them; codes depend on the first keys, in their tightness."""
        _, key, value, *_ = self.inputs
        Lk, start = key.shape[2], self.start
        first = Lk // 2 if kind != "codes" else Lk
        options = {"start": start, "block_size": self.options.get("block_size", Block.size), "capacity": max(first, 1)}
        half = (t[:, :, :first] for t in (key, value))
        index = KeyIndex.build(next(half), kind, value=next(half), end=torch.full_like(start, first), **options)
        if first < Lk:
            index.extend(key, Lk - first, torch.full_like(start, Lk), value)
        return index


def check(kind: str, seed: int) -> str | None:
    """Runs one case, of ``KINDS`` or ``KERNELS``; what is wrong with it, or None."""
    if kind in KERNELS:
        return _check_kernel(kind, seed)
    rng, index, means, broken = random.Random(f"{kind} {seed}"), None, False, kind == "broken"
    layouts = LAYOUTS + COLUMN_LAYOUTS
    if kind == "decode":
        selection = rng.choice(("topk", "topk", "block"))
        while True:
            broken = rng.random() < 0.2
            inputs = random_inputs(rng, rng.choice((1, 1, 3, 32)), 200, broken=broken, layouts=layouts)
            if inputs.has_one_origin and inputs.query.shape[2]:
                break
    else:
        selection = rng.choice(("topk", "topk", "topk", "window", "block", "dense"))
        longest = 60 if kind == "gradient" else 260 if selection == "block" else 150
        inputs = random_inputs(rng, longest, longest, broken=broken, layouts=layouts)
    options = random_options(rng, inputs, selection)
    if kind == "decode":
        means = options.get("tail") == "mean" and rng.random() < 0.7
        index = None if means and rng.random() < 0.3 else {"topk": "codes", "block": "pages"}[selection]
    call = Call(inputs, options, index, means)
    if kind == "gradient":
        return _said(call, f"{kind} {seed}", _check_gradient)
    call.spoil()
    # In the kernels a broken value may reach other rows of its tile.
    backends = ("torch", "cpu") if has_numba() and not broken else ("torch",)
    return _said(call, f"{kind} {seed}", partial(_check_forward, backends=backends))


def _check_kernel(kernel: str, seed: int) -> str | None:
    """A case of the Triton kernels in the interpreter, as on a GPU, with tiles of which two in three are small."""
    from gpu_semantics import GpuSemantics
    from interpreted import small_sizes

    rng = random.Random(f"triton {kernel} {seed}")
    selection = {"block": "block", "window": "window", "dense": "dense", "pages": "block"}.get(kernel, "topk")
    index = {"codes": "codes", "pages": "pages", "means": rng.choice((None, "codes"))}.get(kernel)
    decodes = kernel in ("codes", "pages", "means")
    while True:
        inputs = random_inputs(rng, rng.choice((1, 1, 3)) if decodes else 24, 70)
        B, Hq, Lq, _ = inputs.query.shape
        if 0 < Hq * B <= 12 and inputs.key.shape[2] and (not decodes or (inputs.has_one_origin and Lq)):
            break
    options = random_options(rng, inputs, selection)
    if selection == "topk":
        options["tail"] = "mean" if kernel in ("tail", "means") else "drop"
    with ExitStack() as stack:
        if seed % 3:
            small_sizes(stack.enter_context(pytest.MonkeyPatch.context()))
        gpu = stack.enter_context(GpuSemantics(seed).active())
        call, run = Call(inputs, options, index, kernel == "means"), partial(_check_forward, backends=("triton",))
        said = _said(call, f"triton {kernel} {seed}", run)
    return said or "; ".join(gpu.take_findings()) or None


def random_options(rng: random.Random, inputs: Inputs, selection: str) -> dict[str, Any]:
    """Options of a call with a selection."""
    Hq = inputs.query.shape[1]
    alpha = lambda: rng.choice((0.1, 1.0, 2.0, 4.0, 1e-30, 1e30, rng.uniform(0.1, 9.0)))  # noqa: E731
    exponent = lambda: rng.choice((0.0, 0.5, 1.0, rng.random()))  # noqa: E731
    per_head = rng.random() < 0.3
    options: dict[str, Any] = {
        "selection": selection, "backend": "torch",
        "alpha": [alpha() for _ in range(Hq)] if per_head else alpha(),
        "C": [exponent() for _ in range(Hq)] if per_head and rng.random() < 0.5 else exponent(),
        "min_keys": rng.choice((1, 1, 1, rng.randint(1, 40), 10**9)),
        "sink_keys": rng.choice((4, 0, rng.randint(0, 20), 10**6)),
        "recent_keys": rng.choice((1, 0, rng.randint(0, 20), 10**6)),
        "dense_below": rng.choice((0, 0, 0, rng.randint(0, 260), 10**6)),
    }  # fmt: skip
    if selection == "block":
        options |= {
            "block_size": rng.choice(BLOCK_SIZES),
            "query_block_size": rng.choice(QUERY_BLOCK_SIZES),
            "sample_stride": rng.choice((None, None, *SAMPLE_STRIDES)),
            "local_keys": rng.choice((0, 0, 64, rng.randint(0, 260), 10**6)),
            "min_mass": rng.choice((None, None, 0.5, 0.9)),
            "max_factor": rng.choice((1.0, 4.0, 1e300)),
        }
    return options | ({"tail": rng.choice(("drop", "drop", "mean"))} if selection == "topk" else {})


def _said(call: Call, name: str, run: Any) -> str | None:
    tensors = call.inputs[:3]
    before = [tensor.clone() for tensor in tensors]
    said = run(call)
    if not all(torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)) for a, b in zip(before, tensors, strict=True)):
        said = said or "an input was written to"
    return said and f"{name}: {said}; {call.options} {[tuple(tensor.shape) for tensor in tensors]} {tensors[0].dtype}"


def _check_forward(call: Call, backends: Sequence[str]) -> str | None:
    reference = cache(partial(_reference, call))
    for backend in backends:
        if said := _check_backend(call._replace(options=call.options | {"backend": backend}), reference):
            return f"{backend}: {said}"
    return None


def _check_backend(call: Call, reference: Callable[[int], AttentionResult]) -> str | None:
    alone = call.run()
    result = call.run(return_kept_mass="bounds") if call.index == "codes" else call.run(return_stats=True)
    shape = (*call.inputs.query.shape[:3], call.inputs.value.shape[3])
    for output in (result.output, alone):
        if output.shape != shape or output.dtype != call.inputs.query.dtype:
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


def _reference(call: Call, number: int) -> AttentionResult:
    """The reference of the inputs, or with a number above 0 of some that differ from them by rounding."""
    i, o = call.inputs, call.options
    B, Hq, Lq, _ = i.query.shape
    visible = call.visible
    origin = visible[..., 0] if i.origin is None else i.origin
    selection = "pages" if call.index == "pages" else o["selection"]
    if call.index == "pages":
        origin = call.start[:, None].expand(B, Lq)
    if NCConfig([o["alpha"]], [o["C"]]).is_dense(0):
        selection = "dense"
    laws = list(zip(*(v if isinstance(v, list) else [v] * Hq for v in (o["alpha"], o["C"])), strict=True))
    counts = (visible[..., 1] - visible[..., 0]).tolist()
    budget = [[[budget_of(n, *law, o["min_keys"], o["dense_below"]) for n in rows] for law in laws] for rows in counts]
    settings = {name: o[name] for name in ("block_size", "sink_keys", "recent_keys", *Block.options) if name in o}
    settings |= {"visible": visible, "origin": origin, "selection": selection, "sinks": i.sinks, "softcap": i.softcap}
    settings |= {"budget": torch.tensor(budget, dtype=torch.int32).view(B, Hq, Lq), "scale": _scale(i)}
    settings["tail"] = o.get("tail") == "mean"
    if number == 0:
        return reference_attention(i.query, i.key, i.value, **settings)
    g = torch.Generator().manual_seed(number)
    noisy = [t.double() * (1 + 4e-7 * torch.randn(t.shape, generator=g)) for t in (i.query, i.key)]
    # So is the mass that blocks are found to keep, where they stop at one.
    if o.get("min_mass"):
        settings["min_mass"] = o["min_mass"] * (1 + 2e-6 * float(torch.randn(1, generator=g)))
    return reference_attention(*noisy, i.value, **settings)


def _compare(
    call: Call, result: AttentionResult, alone: torch.Tensor, expected: AttentionResult
) -> tuple[torch.Tensor, str]:
    """In which rows something differs, bool ``[B, Hq, Lq]``, and what."""
    relative, absolute = _tolerances(call)
    figures: dict[str, tuple[Any, torch.Tensor, torch.Tensor]] = {
        "output": (result.output, expected.output, absolute[..., None]),
        "output without statistics": (alone, expected.output, absolute[..., None]),
        "lse": (result.lse, expected.lse, 1e-5 + relative + 1e-6 * expected.lse.abs()),
        "kept_mass": (result.kept_mass, expected.kept_mass, 1e-5 + 2 * relative),
        "attended": (result.attended, expected.attended, torch.tensor(0.0)),
    }
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
    if result.kept_mass_bounds is not None:
        lower, upper = result.kept_mass_bounds.double().unbind(-1)
        mass = expected.kept_mass
        bad = ~((lower <= mass + 1e-12) & (mass <= upper + 1e-12) | mass.isnan())
        wrong, said = wrong | bad, said or ("kept_mass_bounds leave the mass outside" if bad.any() else "")
    return wrong, said


def _tolerances(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding may move logits by, and outputs, float64 ``[B, Hq, Lq]`` each."""
    i, is_tail = call.inputs, call.options.get("tail") == "mean"
    query, key, value = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in i[:3])
    repeat = lambda t: t.repeat_interleave(query.shape[1] // key.shape[1], 1)[..., None]  # noqa: E731
    longest = repeat(torch.cat((key.norm(dim=-1), key.new_zeros(*key.shape[:2], 1)), -1).amax(-1))
    largest = repeat(torch.cat((value.abs().flatten(2), value.new_zeros(*value.shape[:2], 1)), -1).amax(-1))
    logits = query.norm(dim=-1) * longest * _scale(i)
    eps = torch.finfo(i.query.dtype).eps
    sinks = 0.0 if i.sinks is None else float(i.sinks.abs().max())
    relative = 24 * 2.0**-24 * (logits + (i.softcap or 0.0) + sinks + 1)
    if is_tail and i.query.dtype != torch.float32:  # means are rounded to the dtype of the keys
        relative = relative + 2 * eps * (logits + 1)
    # Equal scores stay equal and others are far apart, however large they are.
    of_weights = relative.clamp(max=1e-3) if i.exact and not is_tail else relative
    return relative, largest * (1e-5 + 2 * eps + 2 * of_weights) + 2.0**-24


def _scale(inputs: Inputs) -> float:
    return inputs.query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale


def _check_gradient(call: Call) -> str | None:
    names = [name for name in ("query", "key", "value", "sinks") if getattr(call.inputs, name) is not None]
    tensors = [getattr(call.inputs, name) for name in names]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = call._replace(inputs=call.inputs._replace(**dict(zip(names, leaves, strict=True)))).run()
    if not output.numel():
        return None
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output.double() * weight).sum().backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    said = ""
    allowed = 1e-3 if output.dtype == torch.float32 else 5e-2
    exact = call._replace(inputs=call.inputs._replace(**dict(zip(names, doubles, strict=True))))
    for number in range(call.references):
        expected = _reference(exact, number)
        wanted = torch.autograd.grad(
            (expected.output * weight).sum(), doubles, allow_unused=True, materialize_grads=True
        )
        # Against the largest of all: where the gradient cancels only rounding is left of it.
        size = max(float(each.norm()) for each in wanted) + 1e-6
        errors = [float((leaf.grad.double() - each).norm()) / size for leaf, each in zip(leaves, wanted, strict=True)]
        if all(error < allowed for error in errors):
            return None
        said = said or f"gradients of {names} are off by {errors}"
    return said
