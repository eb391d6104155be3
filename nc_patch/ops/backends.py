"""The one place that chooses which implementation runs an operation."""

import torch

# What each backend implements; what is missing runs on "torch", which implements everything, and is reported.
# "codes", "pages" and "means" are decoding by a key index of that kind, and its upkeep.
IMPLEMENTED: dict[str, frozenset[str]] = {
    "torch": frozenset({"topk", "window", "block", "dense", "codes", "pages", "means"}),
    "triton": frozenset({"topk", "window", "block", "dense", "codes", "pages", "means"}),
}


def choose_backend(
    requested: str, selection: str, device: torch.device, needs_grad: bool = False
) -> tuple[str, str | None]:
    """The backend that runs ``selection`` on ``device``, and why it is not the fast one, if it is not.

    Args:
        requested: ``"auto"``, ``"triton"`` or ``"torch"``.
        selection: ``"topk"``, ``"window"``, ``"block"`` or ``"dense"``, or the kind of a key index.
        needs_grad: whether a gradient will be asked for, which only the PyTorch operations have.

    Raises:
        RuntimeError: Triton was asked for by name where it cannot run.
    """
    if requested == "torch":
        return "torch", None
    problem = triton_problem(device)
    if problem is None and needs_grad:
        problem = "has no gradient, and one is required (under torch.inference_mode() none is)"
    if requested == "triton" and problem is not None:
        raise RuntimeError(f'backend="triton" {problem}. Use backend="auto" or backend="torch".')
    if problem is not None:
        return "torch", None if device.type == "cpu" else f"Triton {problem}"
    if selection not in IMPLEMENTED["triton"]:
        if requested == "triton":
            raise RuntimeError(
                f'backend="triton" has no kernel for selection "{selection}"; it has '
                f'{", ".join(sorted(IMPLEMENTED["triton"]))}. Use backend="auto" or backend="torch".'
            )
        return "torch", f'Triton has no kernel for selection "{selection}"'
    return "triton", None


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``, or None where it can: on a GPU, or anywhere in Triton's interpreter."""
    interpreted = _triton_interprets()
    if interpreted is None:
        return "is not installed (pip install triton)"
    if device.type == "cuda" or interpreted:
        return None
    return f"needs a GPU, and the tensors are on {device.type}"


@torch.compiler.assume_constant_result  # torch.compile cannot trace how Triton reads its settings
def _triton_interprets() -> bool | None:
    """Whether Triton runs in its interpreter; None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return bool(triton.knobs.runtime.interpret)
