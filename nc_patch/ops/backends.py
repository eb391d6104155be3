"""The one place that chooses which implementation runs an operation."""

import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from nc_patch.ops.problem import MAX_HEAD_DIM

Backend = Literal["auto", "triton", "cpu", "torch"]
BACKENDS = get_args(Backend)
# Of an op that reads the device's memory on the host: inductor leaves it out of its CUDA graphs.
READS_HOST = (torch.Tag.cudagraph_unsafe,)
# Ampere: what came before lacks the 8-bit matrix instructions and the shared memory that the kernels use.
_LEAST_CAPABILITY = (8, 0)
INSTALL_NUMBA = "pip install 'nc_patch[cpu]'"
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def choose_backend(
    requested: str, device: torch.device, *, head_dims: Sequence[int], needs_grad: bool = False,
    implemented: Sequence[str] = BACKENDS[1:],
) -> tuple[str, str | None]:  # fmt: skip
    """The backend that runs a call on ``device``, and why it is not a faster one, where that may surprise.

    ``head_dims`` are of the keys, and of the values where they take part; ``implemented``: what has what is called.

    Raises:
        RuntimeError: a backend was asked for by name where it cannot run.
    """
    if requested == "torch":
        return "torch", None
    reasons = {}
    for name, problem_of in (("triton", triton_problem), ("cpu", cpu_problem)):
        if requested not in ("auto", name):
            continue
        nowhere = problem = problem_of(device)
        if problem is None and name not in implemented:
            problem = "has no kernel for it"
        elif problem is None and needs_grad:
            problem = "has no gradient, and one is required (under torch.inference_mode() none is)"
        elif problem is None and name == "triton" and max(head_dims) > MAX_HEAD_DIM:
            sizes = " and ".join(map(str, dict.fromkeys(head_dims)))
            problem = f"takes a head_dim of at most {MAX_HEAD_DIM}, got {sizes}"
        if problem is None:
            return name, None
        if requested == name:
            raise RuntimeError(f'backend="{name}" {problem}. Use backend="auto" or backend="torch".')
        reasons[name] = (nowhere, problem)
    nowhere, problem = reasons["triton"]
    if nowhere is None or device.type != "cpu":
        return "torch", f"Triton {problem}"
    return "torch", None if has_numba() else f"the CPU kernels need Numba ({INSTALL_NUMBA})"


def cpu_problem(device: torch.device) -> str | None:
    """Why the kernels for CPUs cannot run on ``device``, or None where they can."""
    if device.type != "cpu":
        return f"needs the tensors on a CPU, and they are on {device.type}"
    return None if has_numba() else f"needs Numba ({INSTALL_NUMBA})"


def has_numba() -> bool:
    """Whether Numba is installed, which compiles the kernels for CPUs."""
    return _HAS_NUMBA


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``, or None where it can: on a GPU, or anywhere in Triton's interpreter."""
    interpreted = _triton_interprets()
    if interpreted is None:
        return "is not installed (pip install triton)"
    if not interpreted and device.type != "cuda":
        return f"needs a GPU, and the tensors are on {device.type}"
    return None if interpreted else _capability_problem(device)


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
