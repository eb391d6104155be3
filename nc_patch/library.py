"""Attention and its gradient as ``torch.library`` custom ops, the same for all selections.

PyTorch's implementations read intervals and budgets on the host, which no CUDA graph can capture; most of Triton's read
nothing back. ``torch.compile(mode="reduce-overhead")`` has to know which before an op runs, so that each op is
registered twice. A step of decoding that takes its keys into an index is one op, ``decode``, which has no gradient.
"""

from typing import Any

import torch

from nc_patch.common import autocast_off
from nc_patch.ops.attend_rows import attention_gradients
from nc_patch.ops.backends import READS_HOST
from nc_patch.ops.derivatives import needs_gradient, refuse_second_derivative, runs_directly
from nc_patch.ops.problem import AUDIT_COLUMNS, AttentionResult, Problem
from nc_patch.selections.base import Selection, read_selection
from nc_patch.selections.index import extend


def attend(selection: Selection, problem: Problem, backend: str) -> AttentionResult:
    """Attention of a problem by a selection on a backend, "torch" or "triton"; through the op where that is needed."""
    if runs_directly((*problem[:3], *(() if problem.sinks is None else (problem.sinks,)))):
        return selection.run(problem, backend)
    tensors = problem.tensors()
    if problem.new and needs_gradient(*tensors):
        problem = extend(problem, selection.index_kind, backend)
    op, rest = operation(selection, problem, backend), arguments(selection, problem, backend)
    if problem.new:
        index = problem.kept()
        output, *found = op(tensors[: len(tensors) - len(index)], index, *rest)
    else:
        output, *found = op(tensors, *rest)
    fields = zip(found, _fields(selection, problem), strict=True)
    return AttentionResult(output, *(field if wanted else None for field, (wanted, _, _) in fields))


def operation(selection: Selection, problem: Problem, backend: str) -> Any:
    """The op that runs a problem: one that inductor leaves out of CUDA graphs, where the backend reads the host."""
    return _OPERATIONS["decode" if problem.new else "attend", (problem.phase, backend) in selection.on_host]


def arguments(selection: Selection, problem: Problem, backend: str) -> tuple[Any, ...]:
    """What the op takes beside ``problem.tensors()``."""
    return selection.written(), [problem.scale, problem.softcap], problem.flags(), problem.most, backend


def _fields(selection: Selection, problem: Problem) -> list[tuple[bool, tuple[int, ...], torch.dtype]]:
    """Of each field of the result but the output: whether a selection gives it for a problem, its shape and dtype."""
    decodes, rows, heads = problem.phase == "decode", problem.query.shape[:3], problem.query.shape[1]
    bounds, estimates = decodes and problem.bounds, selection.estimates and not decodes
    return [
        (problem.stats or bounds, rows, torch.float32),
        (problem.stats, rows, torch.float32),
        (selection.counts_attended, rows, torch.int32),
        (bounds, (*rows, 2), torch.float32),
        (estimates and problem.audit_seed >= 0, (heads + 1, len(AUDIT_COLUMNS)), torch.float32),
    ]


def _run(
    tensors: list[torch.Tensor], selection: str, numbers: list[float], flags: list[int], most: int, backend: str
) -> list[torch.Tensor]:
    """Attention of the problem that the tensors, the numbers and the flags make; see ``Problem.unflatten``.

    Returns the fields of an ``AttentionResult``, empty where one is None.
    """
    problem = Problem.unflatten(tensors, numbers, flags, most)
    chosen = read_selection(selection)
    output, *found = chosen.run(problem, backend)
    output = output.contiguous()  # as compiled graphs expect; kernels for CPUs write it as the model goes on with it
    given = zip(found, _fields(chosen, problem), strict=True)
    nothing = lambda dtype: output.new_empty(0, dtype=dtype)  # noqa: E731
    return [output, *(t if wanted and t is not None else nothing(dtype) for t, (wanted, _, dtype) in given)]


def _run_fake(
    tensors: list[torch.Tensor], selection: str, numbers: list[float], flags: list[int], most: int, backend: str
) -> list[torch.Tensor]:
    problem = Problem.unflatten(tensors, numbers, flags, most)
    output = problem.query.new_empty(*problem.query.shape[:3], problem.value.shape[-1])
    fields = _fields(read_selection(selection), problem)
    return [output, *(output.new_empty(shape if wanted else 0, dtype=dtype) for wanted, shape, dtype in fields)]


def _decoding(run: Any) -> Any:
    """``_run``, or its fake, of a problem whose ``index`` takes in new keys."""
    return lambda tensors, index, *rest: tuple(run([*tensors, *index], *rest))


_REST = "str selection, float[] numbers, int[] flags, SymInt most, str backend"
# An op that changes tensors in place cannot return a list.
_FIELDS = ", ".join(["Tensor"] * len(AttentionResult._fields))
# By name, and whether it reads the device on the host.
_OPERATIONS: dict[tuple[str, bool], Any] = {}
for _name, _runs, _fakes, _index, _returns in (
    ("attend", _run, _run_fake, "", "Tensor[]"),
    ("decode", _decoding(_run), _decoding(_run_fake), "Tensor(a!)[] index, ", f"({_FIELDS})"),
):
    for _on_host in (False, True):
        _op: Any = torch.library.custom_op(
            f"nc_patch::{_name}{'_on_host' * _on_host}", _runs, mutates_args=("index",) if _index else (),
            schema=f"(Tensor[] tensors, {_index}{_REST}) -> {_returns}", tags=READS_HOST if _on_host else (),
        )  # fmt: skip
        _op.register_fake(_fakes)
        _OPERATIONS[_name, _on_host] = _op


@torch.library.custom_op("nc_patch::attend_backward", mutates_args=(), tags=READS_HOST)
def _attend_backward(
    grad_output: torch.Tensor, tensors: list[torch.Tensor], selection: str, numbers: list[float], flags: list[int]
) -> list[torch.Tensor]:
    """Gradients of query, key, value and sinks (empty where there are none), in PyTorch, through the attended keys."""
    problem = Problem.unflatten(tensors, numbers, flags)
    chosen = read_selection(selection)
    with autocast_off(problem.query):
        problem = chosen.with_means(problem, "torch")
        *of_tensors, sinks = attention_gradients(problem, chosen.choice(problem), grad_output)
    return [*of_tensors, problem.query.new_empty(0) if sinks is None else sinks]


@_attend_backward.register_fake
def _(grad_output, tensors, selection, numbers, flags):  # type: ignore[no-untyped-def]
    # Contiguous, as the gradients are, whatever the strides of the tensors.
    sinks = tensors[6].new_empty(tensors[6].shape) if flags[0] else tensors[0].new_empty(0)
    return [*(tensor.new_empty(tensor.shape) for tensor in tensors[:3]), sinks]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, selection, numbers, flags, _, backend = inputs
    ctx.decodes = len(tensors) > 6 + flags[0] + 2 * flags[1]
    if backend != "torch" and not ctx.decodes:
        raise RuntimeError('gradients need backend="torch": forward and backward must choose the same keys')
    ctx.save_for_backward(*tensors)
    ctx.settings = (selection, numbers, flags)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    if ctx.decodes:
        raise RuntimeError(
            "decoding by an index has no gradient. Train on whole sequences, with use_cache=False, or let the layers "
            'decode without an index: decode="topk" or "window"'
        )
    tensors = list(ctx.saved_tensors)  # to be asked for once: gradient checkpointing computes them when it is
    grad_output = grads[0][0] if isinstance(grads[0], (list, tuple)) else grads[0]
    found = _attend_backward(grad_output, tensors, *ctx.settings)
    has_sinks = ctx.settings[2][0]
    of_tensors = [*found[:3], None, None, None, *found[3 : 3 + has_sinks]]
    return [*of_tensors, *(None,) * (len(tensors) - len(of_tensors))], None, None, None, None, None


for _op in (_OPERATIONS["attend", False], _OPERATIONS["attend", True]):
    _op.register_autograd(_backward, setup_context=_setup)
_attend_backward.register_autograd(refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)
