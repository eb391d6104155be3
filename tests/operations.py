"""What tests of attention share: the backends that run here, problems of loose tensors, and comparisons."""

from typing import Any

import pytest
import torch

from nc_patch.ops import backends
from nc_patch.ops.problem import Problem

# Whether kernels run in Triton's interpreter, which is settled when they are imported.
INTERPRETED = bool(backends._triton_interprets())
# The backends that run here without a GPU, and a mark that runs a test on each, and on a GPU where there is one.
INSTALLED = ("triton",) if INTERPRETED else ("torch", "cpu") if backends.has_numba() else ("torch",)
BACKENDS = [*INSTALLED, *(() if INTERPRETED else (pytest.param("triton", marks=pytest.mark.gpu),))]
EACH = pytest.mark.parametrize("backend", BACKENDS)


def device_of(backend: str) -> str:
    """Where a backend runs."""
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


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


def problem_of_case(case: Any, device: str = "cpu", **more: Any) -> Problem:
    """The problem of an ``attention_cases.Case``, on a device."""
    tensors = (case.query, case.key, case.value, case.visible, case.budget, case.sinks)
    moved = (None if t is None else t.to(device) for t in tensors)
    return problem_of(*moved, scale=case.scale, softcap=case.softcap, origin=case.origin.to(device), **more)
