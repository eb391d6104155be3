"""The one place that chooses which implementation runs an operation."""

from collections.abc import Sequence

import torch

from nc_patch.ops.limits import MAX_HEAD_DIM

# What each backend implements; what is missing runs on "torch", which implements everything, and is reported.
# "codes", "pages" and "means" are decoding by a key index of that kind, and its upkeep.
IMPLEMENTED: dict[str, frozenset[str]] = {
    "torch": frozenset({"topk", "window", "block", "dense", "codes", "pages", "means"}),
    "triton": frozenset({"topk", "window", "block", "dense", "codes", "pages", "means"}),
}
# Ampere: what came before lacks the 8-bit matrix instructions and the shared memory that the kernels use.
_LEAST_CAPABILITY = (8, 0)


def choose_backend(
    requested: str,
    selection: str,
    device: torch.device,
    *,
    head_dims: Sequence[int],
    estimator: str = "sampled",
    needs_grad: bool = False,
) -> tuple[str, str | None]:
    """The backend that runs ``selection`` on ``device``, and why it is not the fast one, if it is not.

    Args:
        requested: ``"auto"``, ``"triton"`` or ``"torch"``.
        selection: ``"topk"``, ``"window"``, ``"block"`` or ``"dense"``, or the kind of a key index.
        head_dims: of the keys, and of the values where they take part.
        estimator: of ``"block"``, what scores the key blocks.
        needs_grad: whether a gradient will be asked for, which only the PyTorch operations have.

    Raises:
        RuntimeError: Triton was asked for by name where it cannot run.
    """
    if requested == "torch":
        return "torch", None
    nowhere = triton_problem(device)
    problem = nowhere or _problem_of_call(selection, head_dims, estimator, needs_grad)
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


def _problem_of_call(selection: str, head_dims: Sequence[int], estimator: str, needs_grad: bool) -> str | None:
    """Why Triton has nothing to run this call with, on any device; None where it has."""
    if selection not in IMPLEMENTED["triton"]:
        allowed = ", ".join(sorted(IMPLEMENTED["triton"]))
        return f'has no kernel for selection "{selection}"; it has {allowed}'
    if needs_grad:
        return "has no gradient, and one is required (under torch.inference_mode() none is)"
    if max(head_dims) > MAX_HEAD_DIM:
        sizes = " and ".join(map(str, dict.fromkeys(head_dims)))
        return f"takes a head_dim of at most {MAX_HEAD_DIM}, got {sizes}"
    if selection == "block" and estimator != "sampled":
        return f'scores blocks by estimator="sampled" alone, got "{estimator}"'
    return None


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
