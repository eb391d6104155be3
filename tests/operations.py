"""Attention of loose tensors and settings, as tests call it: by an operation, an implementation, or in float64."""

from typing import Any

import torch

from nc_patch.ops import backends
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import Rows
from nc_patch.selections import Block, Selection, TopK
from nc_patch.selections.base import selection_class

# Whether kernels run in Triton's interpreter, which is settled when they are imported.
INTERPRETED = bool(backends._triton_interprets())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The same NaNs and infinities, and elsewhere a relative error of the norm below the tolerance."""
    actual = actual.double()
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])
    finite = expected.isfinite()
    difference, size = (actual[finite] - expected[finite]).norm(), expected[finite].norm().clamp(min=1e-30)
    assert difference <= tolerance * size, f"relative error {difference / size:.2e}"


def problem_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, budget: torch.Tensor,
    sinks: torch.Tensor | None = None, *, scale: float = 1.0, softcap: float | None = 0.0,
    origin: torch.Tensor | None = None, **more: Any,
) -> Problem:  # fmt: skip
    """A problem; each sequence begins where its interval does, unless ``origin`` says otherwise."""
    origin = visible[..., 0] if origin is None else origin
    tensors = (query, key, value, visible.contiguous(), origin.contiguous(), budget.contiguous())
    return Problem(*tensors, scale=scale, softcap=softcap or 0.0, sinks=sinks, **more)


def selection_of(name: str, **options: Any) -> Selection:
    """The selection of a name with those of the options that it has; ``tail`` is whether page means count."""
    kind = selection_class({"pages": "block"}.get(name, name))
    given = {"sink_keys": 0, "recent_keys": 0, **options, "tail": "mean" if options.get("tail") else "drop"}
    chosen = kind(**{option: given[option] for option in kind.options if option in given})
    if isinstance(chosen, Block):  # tests take smaller ones too
        object.__setattr__(chosen, "size", options.get("block_size", chosen.size))
    return chosen


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, visible: torch.Tensor, budget: torch.Tensor,
    selection: str, scale: float, softcap: float | None = None, sinks: torch.Tensor | None = None,
    origin: torch.Tensor | None = None, **options: Any,
) -> AttentionResult:  # fmt: skip
    """Attention in float64, as a selection defines it; ``"pages"`` are blocks while decoding."""
    problem = problem_of(query, key, value, visible, budget, sinks, scale=scale, softcap=softcap, origin=origin)
    return selection_of(selection, **options).reference(problem, decode=selection == "pages")


def topk_mask(
    scores: torch.Tensor, visible: torch.Tensor, budget: torch.Tensor, sink_keys: int, recent_keys: int
) -> torch.Tensor:
    """Keys that ``topk`` attends by scores ``[B, H, Lq, Lk]``, bool of the same shape."""
    chosen = TopK(sink_keys, recent_keys, "drop")
    rows = (Rows(visible[b], budget[b], visible[b, :, 0], 0, 1) for b in range(len(scores)))
    return torch.stack([chosen.keep(each, of) for each, of in zip(scores, rows, strict=True)])


def problem_of_case(case: Any, device: str = "cpu", **more: Any) -> Problem:
    """The problem of an ``attention_cases.Case``, on a device."""
    tensors = (case.query, case.key, case.value, case.visible, case.budget, case.sinks)
    moved = (None if t is None else t.to(device) for t in tensors)
    return problem_of(*moved, scale=case.scale, softcap=case.softcap, origin=case.origin.to(device), **more)


def assert_summarises(codes: torch.Tensor, scales: torch.Tensor, page: torch.Tensor) -> None:
    """``codes [3, D]`` and ``scales [3]`` are those of the keys ``[n, D]``; of the farthest any may be apart."""
    page, n = page.double(), len(page)
    apart, mean, root = codes.double() * scales[:, None].double()
    # A code is off by half a step, and by a whole one of the smallest numbers.
    step = lambda x: 0.502 * float(x.abs().max()) / 127 + 1e-37  # noqa: E731
    distance = (page - page.mean(0)).square().sum(-1)
    far = (page - apart).abs().amax(-1).argmin()
    assert float((page[far] - apart).abs().max()) <= step(page[far])
    assert float(distance[far]) >= float(distance.max()) * (1 - 1e-5)
    if n == 1:
        assert not codes[1:].any()
        return
    largest = float(page.abs().max())
    variance = codes[2] * scales[2].double() ** 2
    assert (root >= 0).all()
    # Equal distances are decided by rounding.
    for i in (distance >= distance.max() * (1 - 1e-5)).nonzero()[:, 0]:
        others = page[torch.arange(n) != i]
        of_mean, of_variance = others.mean(0), others.var(0, correction=0)
        if float((of_mean - mean).abs().max()) <= step(of_mean) + 1e-5 * largest:
            off = float((of_variance - variance).abs().max())
            assert off <= step(of_variance) + 1e-5 * largest**2
            return
    raise AssertionError("no mean of the others is that of the page")
