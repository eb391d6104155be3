"""Gradients of the operations, in autograd and in the transforms of ``torch.func``; and what has none, in words.

A ``torch.library`` op with a gradient takes part in autograd and in ``torch.compile``, and not in those transforms.
While one runs, an ``autograd.Function`` of the form that they take stands in for the op.
"""

from collections.abc import Callable
from typing import Any

import torch

_NO_FORWARD_MODE = (
    "sparse attention has no derivative in forward mode (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad). "
    "Use reverse mode, tensor.backward(), torch.autograd.grad or torch.func.grad, or unpatch the model"
)
_NO_SECOND = (
    "sparse attention has no second derivative (create_graph=True, torch.func.grad of grad, hessian): the gradient of "
    "its attended keys is all there is. Use first derivatives, or unpatch the model"
)

# By the op: what stands in for it in a transform.
_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` runs: grad, vmap, jvp, or one that is made of them."""
    return bool(torch._C._are_functorch_transforms_active())


def refuse_mapped(**arguments: Any) -> None:
    """Raises NotImplementedError where an argument has another value in each step of a ``torch.func.vmap``."""
    functorch = torch._C._functorch
    for name, value in arguments.items() if in_transform() and not torch.compiler.is_compiling() else ():
        while isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value):
            if functorch.is_batchedtensor(value):
                raise NotImplementedError(
                    f"torch.func.vmap maps over {name}, whose values are read before anything is computed. Give all "
                    "rows to one call, as its batch, or map over other arguments alone"
                )
            value = functorch.get_unwrapped(value)


def register_gradient(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Gives an op its gradient; the arguments are those of ``torch.library.register_autograd``."""
    op.register_autograd(backward, setup_context=setup_context)
    body = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *args: op(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(refuse_forward_mode),
    }
    _FUNCTIONS[op] = type("TransformedOp", (torch.autograd.Function,), body)


def no_second_derivative(op: Any) -> None:
    """Makes an op that computes gradients refuse, in words, to be differentiated again."""
    register_gradient(op, _refuse_second, lambda ctx, inputs, output: None)


def call(op: Any, *args: Any) -> Any:
    """Calls an op that ``register_gradient`` knows."""
    return _call_transformed(op, *args) if in_transform() else op(*args)


@torch.compiler.disable(
    reason="sparse attention in a transform of torch.func (grad, vmap) runs outside of graphs: leave out fullgraph=True"
)
def _call_transformed(op: Any, *args: Any) -> Any:
    return _FUNCTIONS[op].apply(*args)


def refuse_forward_mode(*_: Any) -> None:
    """Raises NotImplementedError: PyTorch takes the tangent of an operation that has none for zero."""
    raise NotImplementedError(_NO_FORWARD_MODE)


def _refuse_second(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(_NO_SECOND)
