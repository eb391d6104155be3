"""Custom ops that a CUDA graph may not hold, where the PyTorch backend sizes its work by what is in a tensor.

PyTorch's implementations read intervals and budgets on the host, which no CUDA graph can capture or replay; Triton's
read nothing back. ``torch.compile(mode="reduce-overhead")`` has to know an op's kind before it runs, so that each
operation is registered twice, and the name that is called follows from the backend.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Of an op that reads the device's memory on the host: inductor leaves it out of its CUDA graphs.
READS_HOST: tuple[torch.Tag, ...] = (
    (torch._C.Tag.cudagraph_unsafe,) if hasattr(torch._C.Tag, "cudagraph_unsafe") else ()
)


class BackendOp:
    """One operation as two custom ops: ``nc_patch::NAME``, and ``nc_patch::NAME_on_host`` for the PyTorch backend.

    It is called like the function, whose argument ``backend``, passed by position, says which op runs.

    Attributes:
        function: what both run.
    """

    def __init__(self, function: Callable[..., Any], mutates_args: Iterable[str]) -> None:
        self.function = function
        name = f"nc_patch::{function.__name__}"
        self._place = list(inspect.signature(function).parameters).index("backend")
        self._on_device = torch.library.custom_op(name, function, mutates_args=mutates_args)
        self._on_host = torch.library.custom_op(f"{name}_on_host", function, mutates_args=mutates_args, tags=READS_HOST)

    def __call__(self, *args: Any) -> Any:
        """Runs the op of the backend in ``args``."""
        return self.of(args[self._place])(*args)

    def of(self, backend: str) -> torch.library.CustomOpDef:
        """The custom op that is called for ``backend``, "torch" or "triton"."""
        return self._on_host if backend == "torch" else self._on_device

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As of a custom op, for both; a decorator."""
        self._on_device.register_fake(fake)
        self._on_host.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As of a custom op, for both."""
        self._on_device.register_autograd(backward, setup_context=setup_context)
        self._on_host.register_autograd(backward, setup_context=setup_context)


def op_by_backend(*, mutates_args: Iterable[str]) -> Callable[[Callable[..., Any]], BackendOp]:
    """Registers a function with an argument ``backend`` as a ``BackendOp``; ``mutates_args`` as of ``custom_op``."""
    return lambda function: BackendOp(function, mutates_args)
