"""What traces a call, or wants its derivative; and which derivatives there are not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` runs: grad, vmap, jvp, or one that is made of them."""
    return bool(torch._C._are_functorch_transforms_active())


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value may be read on the host."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def runs_directly(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an implementation may be called without its op, which takes longer than a step of a small model: nothing
    traces it, and nothing records a gradient of these ``tensors``.
    """
    traced = torch.compiler.is_compiling() or in_transform() or not _PLAIN.issuperset(map(type, tensors))
    return not traced and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want the gradient of any of the tensors."""
    wanted = in_transform() or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return torch.is_grad_enabled() and wanted


def refuse_tangents(*tensors: torch.Tensor) -> None:
    """Refuses derivatives in forward mode, which PyTorch takes for zero where an operation has none."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        refuse_forward_mode()


def refuse_forward_mode(*_: Any) -> None:
    """Raises NotImplementedError: PyTorch takes the tangent of an operation that has none for zero."""
    raise NotImplementedError(
        "sparse attention has no derivative in forward mode (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad). Use reverse mode, tensor.backward() or torch.func.grad, or unpatch the model"
    )


def refuse_second_derivative(ctx: Any, *_: Any) -> None:
    """Raises NotImplementedError; the backward of what computes gradients."""
    raise NotImplementedError(
        "sparse attention has no second derivative (create_graph=True, torch.func.grad of grad, hessian): the gradient "
        "of its attended keys is all there is. Use first derivatives, or unpatch the model"
    )
