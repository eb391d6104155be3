"""What traces a call, or wants its derivative; and which derivatives there are not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value may be read on the host."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def runs_directly(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an implementation may be called without its op, which takes longer than a step of a small model: nothing
    traces it, and nothing records a gradient of these ``tensors``.
    """
    traced = torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors))
    return not traced and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want the gradient of any of the tensors."""
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return torch.is_grad_enabled() and wanted


def refuse_transforms(*tensors: torch.Tensor) -> None:
    """Refuses what is not derived by ``backward``; PyTorch takes a tangent for zero where an operation has none."""
    if torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling()
        and forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        raise NotImplementedError(
            "sparse attention does not run in transforms of torch.func (grad, vmap, jvp, hessian), nor with the dual "
            "numbers of forward mode. Use tensor.backward(), one sample after another, or unpatch the model"
        )


def refuse_second_derivative(ctx: Any, *_: Any) -> None:
    """Raises NotImplementedError; the backward of what computes gradients."""
    raise NotImplementedError(
        "sparse attention has no second derivative (create_graph=True, hessian): the gradient of its attended keys is "
        "all there is. Use first derivatives, or unpatch the model"
    )
