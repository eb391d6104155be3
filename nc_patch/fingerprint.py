"""Telling models apart by their weights."""

import hashlib

import torch

# Elements of each parameter that enter the fingerprint: enough to tell any two checkpoints apart, and quick.
_FINGERPRINT_ELEMENTS = 4096


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A short hex digest of the parameters: their names, shapes, dtypes and evenly spaced elements of each.

    The same weights have the same fingerprint whatever file they came from.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # Of a model over several processes each holds a part; they put one parameter after the other together.
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        flat = whole.detach().reshape(-1)
        stride = max(1, flat.numel() // _FINGERPRINT_ELEMENTS)
        sample = flat[::stride].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
