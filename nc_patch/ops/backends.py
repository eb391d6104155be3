"""The one place that chooses which implementation runs an operation."""

from collections.abc import Sequence

import torch

from nc_patch.common import check_choice
from nc_patch.ops.problem import MAX_HEAD_DIM

BACKENDS = ("auto", "triton", "torch")
# Of an op that reads the device's memory on the host: inductor leaves it out of its CUDA graphs.
READS_HOST: tuple[torch.Tag, ...] = (
    (torch._C.Tag.cudagraph_unsafe,) if hasattr(torch._C.Tag, "cudagraph_unsafe") else ()
)
# Ampere: what came before lacks the 8-bit matrix instructions and the shared memory that the kernels use.
_LEAST_CAPABILITY = (8, 0)


def check_backend(requested: str) -> None:
    """Raises ValueError unless a backend is one that there is."""
    check_choice("backend", requested, BACKENDS)


def choose_backend(
    requested: str,
    device: torch.device,
    *,
    head_dims: Sequence[int],
    needs_grad: bool = False,
    implemented: Sequence[str] = ("triton", "torch"),
) -> tuple[str, str | None]:
    """The backend that runs a call on ``device``, and why it is not the fast one, if it is not.

    Args:
        head_dims: of the keys, and of the values where they take part.
        needs_grad: whether a gradient will be asked for, which only PyTorch has.
        implemented: the backends that have what is called; PyTorch has everything.

    Raises:
        RuntimeError: Triton was asked for by name where it cannot run.
    """
    if requested == "torch":
        return "torch", None
    nowhere = problem = triton_problem(device)
    if problem is None and "triton" not in implemented:
        problem = "has no kernel for it"
    elif problem is None and needs_grad:
        problem = "has no gradient, and one is required (under torch.inference_mode() none is)"
    elif problem is None and max(head_dims) > MAX_HEAD_DIM:
        sizes = " and ".join(map(str, dict.fromkeys(head_dims)))
        problem = f"takes a head_dim of at most {MAX_HEAD_DIM}, got {sizes}"
    if problem is None:
        return "triton", None
    if requested == "triton":
        raise RuntimeError(f'backend="triton" {problem}. Use backend="auto" or backend="torch".')
    # On a CPU nothing else is expected.
    return "torch", None if nowhere is not None and device.type == "cpu" else f"Triton {problem}"


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``, or None where it can: on a GPU, or anywhere in Triton's interpreter."""
    interpreted = _triton_interprets()
    if interpreted is None:
        return "is not installed (pip install triton)"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"needs a GPU, and the tensors are on {device.type}"
    return _capability_problem(device)


@torch.compiler.assume_constant_result  # torch.compile cannot trace how Triton reads its settings
def _triton_interprets() -> bool | None:
    """Whether Triton runs in its interpreter; None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result  # nor how a device is asked
def _capability_problem(device: torch.device) -> str | None:
    """Why the kernels do not compile for an NVIDIA GPU, or do not fit it; None where they do, and on AMD's."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    least, got = (".".join(map(str, version)) for version in (_LEAST_CAPABILITY, capability))
    return f"needs a GPU of compute capability {least} or higher, and {device} has {got}"
