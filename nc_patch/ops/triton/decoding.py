"""Steps of decoding: what is worked out once, for all layers and many steps, and what each launches."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton.launch import architecture_of, on_device, prepared, settings_of
from nc_patch.ops.triton.structs import Heads

# Decodes a problem, in scratch memory that is kept by stream for those after it.
Decoder = Callable[[dict[int, Any], Problem], AttentionResult]

# Parts of a scratch memory begin at multiples of so many numbers.
_ALIGNED = 32
# What decodes the problems of a layout.
_DECODERS: dict[tuple[Any, ...], Decoder] = {}
_MOST_DECODERS = 512


def bound_decoder(
    make: Callable[..., Decoder], take_in: Callable[[Problem], Problem], problem: Problem, keys: int, most: int,
    *settings: Any,
) -> Callable[[Problem], AttentionResult]:  # fmt: skip
    """What decodes problems like this one, see ``Selection.bound``: ``make(problem, *settings)``, made once.

    It is planned for so many ``keys``, and budgets of ``most``. Where kernels do not take tensors as they lie, it
    copies them, after it has let ``take_in`` write new keys to the index itself.
    """
    layout = (make, *settings, *layout_of(problem, keys, most))
    decode = _DECODERS.get(layout)
    if decode is None:
        if len(_DECODERS) >= _MOST_DECODERS:
            _DECODERS.clear()
        dense = problem if problem.table is not None else prepared(problem)
        if all(mine is its for mine, its in zip(problem.tensors(), dense.tensors(), strict=True)):
            decode = make(problem, *settings)
        else:

            def decode(_: Any, like: Problem) -> AttentionResult:
                like = prepared(take_in(like) if like.new else like)
                return bound_decoder(make, take_in, like, keys, most, *settings)(like)

        _DECODERS[layout] = decode
    return partial(decode, {})


def layout_of(problem: Problem, keys: int, most: int) -> tuple[Any, ...]:
    """What the launches of a decoding step follow from, taken as one over so many keys with so large a budget."""
    query, key, value, *others = problem.tensors() + ([] if problem.table is None else [problem.table])
    return (
        *(keys, most, problem.scale, problem.softcap, *problem.flags(), problem.table is None),
        *(architecture_of(query.device), key.shape[2:3] == value.shape[2:3]),
        *((t.shape[:2], t.shape[3:], t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in (key, value)),
        *((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in (query, *others)),
    )


class Launches:
    """Kernels that are launched one after another, for problems that are alike.

    Triton looks at every argument the first time, which takes several times as long as the rest of a launch.

    Args:
        problem: one of those.
        kernels: with the grid and the options of each.
        arguments: by name, what several take and what is the same for all of the problems.
        scratch: by name, how many numbers of 32 bits each part of the memory holds in which kernels leave something for
            those after them. They take it as ``scratch``: the memory as ``floats`` and as ``integers``, and where in
            both each part begins.
    """

    def __init__(
        self, problem: Problem, kernels: Sequence[tuple[Any, tuple[int, int, int], dict[str, Any]]],
        arguments: dict[str, Any], scratch: dict[str, int],
    ) -> None:  # fmt: skip
        self._kernels = kernels
        self._arguments = {
            "num_kv_heads": problem.key.shape[1], "group": problem.group, "Lq": problem.query.shape[2],
            "budget_heads": problem.budget.shape[1], "settings": settings_of(problem), **arguments,
        }  # fmt: skip
        # The shape ``[B, Hq, Lq]``. Tuples make tensors faster than sizes do.
        self.rows = tuple(problem.query.shape[:3])
        self._output = (*self.rows, problem.value.shape[3])
        self._strides = tuple(tensor.stride()[:3] for tensor in problem[:3])
        sizes = (-(-size // _ALIGNED) * _ALIGNED for size in scratch.values())
        *self._begins, self.scratch_size = accumulate(sizes, initial=0)
        self._scratch = _scratch_type(tuple(scratch))
        # Of each kernel what launches it, its arguments in order, and where those are that change.
        self._ready: list[tuple[Any, list[Any], list[tuple[int, str]]]] = []

    def __call__(self, kept: dict[int, Any], problem: Problem, arguments: dict[str, Any]) -> torch.Tensor:
        """Launches the kernels for a problem on the current stream, and returns the output.

        They take ``arguments`` and what is added here, the scratch memory among it: that of the stream in ``kept``.
        """
        (query, key, value), strides = problem[:3], self._strides
        output = query.new_empty(self._output)
        with on_device(query.device):
            stream = _stream_of(query.device)
            if stream not in kept:
                memory = torch.empty(self.scratch_size, dtype=torch.float32, device=query.device)
                scratch = self._scratch(memory, memory.view(torch.int32), *self._begins)
                kept[stream] = {"scratch": scratch, "Lk": problem.key_length}
            arguments |= kept[stream]
            arguments["query"], arguments["key"] = Heads(query, *strides[0]), Heads(key, *strides[1])
            arguments["value"], arguments["sinks"] = Heads(value, *strides[2]), problem.sinks
            arguments["output"] = output
            if output.numel():
                self._launch(arguments, stream)
        return output

    def _launch(self, changing: dict[str, Any], stream: int) -> None:
        for launch, arguments, places in self._ready:
            taken = arguments.copy()
            for place, name in places:
                taken[place] = changing[name]
            launch(*taken, stream=stream)
        if not self._ready:
            self._launch_first(changing)

    def _launch_first(self, changing: dict[str, Any]) -> None:
        ready = []
        for kernel, grid, options in self._kernels:
            given, fixed = {**self._arguments, **changing}, {**self._arguments, **options}
            compiled = kernel[grid](**{name: given[name] for name in kernel.arg_names if name in given}, **options)
            if compiled is not None:  # as it is in the interpreter
                places = [(at, name) for at, name in enumerate(kernel.arg_names) if name in changing]
                ready.append((compiled[grid], [fixed.get(name) for name in kernel.arg_names], places))
        if len(ready) == len(self._kernels):
            self._ready = ready


def _stream_of(device: torch.device) -> int:
    """The stream on which this thread launches on a device."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


@lru_cache
def _scratch_type(parts: tuple[str, ...]) -> Any:
    """A named tuple of a scratch memory with these parts: the same for the same ones, by which Triton knows kernels."""
    return namedtuple("Scratch", ("floats", "integers", *parts))
