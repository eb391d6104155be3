"""Telling models apart by their weights."""

import hashlib
from collections.abc import Iterator, Mapping

import torch

# Elements of each parameter that enter the fingerprint: enough to tell any two checkpoints apart, and quick.
_FINGERPRINT_ELEMENTS = 4096


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A short hex digest of the parameters: their names, shapes, dtypes and evenly spaced elements of each.

    The same weights have the same fingerprint whatever file they came from, and wherever they are kept: on several
    devices, over several processes, or offloaded by ``accelerate`` to the CPU or the disk.

    Raises:
        ValueError: the model is on the meta device, without weights.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # Of a model over several processes each holds a part; they put one parameter after the other together.
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        if whole.is_meta:
            whole = _offloaded(model, name)
        flat = whole.detach().reshape(-1)
        stride = max(1, flat.numel() // _FINGERPRINT_ELEMENTS)
        sample = flat[::stride].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter that ``accelerate`` keeps elsewhere while its module does not run."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # a hook may stand for the modules within its own
        for weights in _weights_maps(model.get_submodule(".".join(parts[:depth]))):
            try:
                return weights[".".join(parts[depth:])]
            except KeyError:
                continue
    raise ValueError(
        f"{name} is on the meta device and holds no weights, so the model cannot be told from others: load its "
        "weights, or without --device-map place it on one device"
    )


def _weights_maps(module: torch.nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    """What the hooks of ``accelerate`` on a module keep, by the parameters' names within it."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights: Mapping[str, torch.Tensor] | None = getattr(one, "weights_map", None)
        if weights is not None:
            yield weights
