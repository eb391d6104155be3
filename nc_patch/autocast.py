"""``torch.autocast`` around attention: the tensors it casts for dense attention, and everything else as it is."""

import contextlib
from typing import Any

import torch

# Asked for once, since PyTorch 2.11 cannot compile the question.
_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(name)
)


def lowered(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype in which autocast, where it is on, runs ``scaled_dot_product_attention``."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors) or not _is_on(tensors[0].device):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    eligible = lambda t: t.is_floating_point() and t.dtype != torch.float64  # noqa: E731
    return tuple(tensor.to(dtype) if eligible(tensor) else tensor for tensor in tensors)


def autocast_off(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off on a tensor's device: scores and softmax are float32, and indexes bound what they index."""
    if isinstance(tensor, torch.Tensor) and _is_on(tensor.device):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def _is_on(device: torch.device) -> bool:
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)
