"""Telling models apart by their weights."""

import hashlib

import torch

# Elements of each parameter that are read: enough to tell any two checkpoints apart, and quick.
_ELEMENTS = 4096


def weights_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of the parameters' names, shapes, dtypes and evenly spaced elements, wherever they are kept.

    Raises:
        ValueError: the model is on the meta device, without weights.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # A DTensor is gathered from its processes.
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        flat = (_offloaded(model, name) if whole.is_meta else whole).detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _ELEMENTS)].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter that ``accelerate`` has offloaded; its hooks keep it by its name within their module."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weight = (getattr(one, "weights_map", None) or {}).get(".".join(parts[depth:]))
            if weight is not None:
                return weight
    raise ValueError(
        f"{name} is on the meta device and holds no weights, so the model cannot be told from others: load its "
        "weights, or without --device-map place it on one device"
    )
