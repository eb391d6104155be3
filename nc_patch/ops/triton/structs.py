"""The structures that Triton kernels take, pass on and return: named tuples, the first of them built on the host.

A member that is None compiles what it would be used for out of the kernel. Constants are members too, wrapped by
``tl.constexpr``. Integers for whose values no kernel is compiled (``PER_CALL``) stay arguments of their own, since
``do_not_specialize`` does not reach into tuples. A program works on ``BLOCK_M`` rows; vectors of its rows are
``[BLOCK_M]``, tiles ``[BLOCK_M, BLOCK_N]``.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

# Arguments whose values no kernel is compiled for: prompts of any length share one variant.
PER_CALL = ("num_kv_heads", "group", "Lq", "Lk", "budget_heads", "sink_keys", "recent_keys")


class Heads(NamedTuple):
    """A tensor ``[B, H, L, D]`` with a dense last axis, of any other strides; see ``heads``."""

    data: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any


class Table(NamedTuple):
    """Where keys lie in blocks of memory: int32 rows of blocks, one for each sequence, and the step between rows."""

    data: Any
    stride: Any


class RowInputs(NamedTuple):
    """What is given for each query: contiguous int32 ``[B, Lq, 2]``, ``[B, 1 or Hq, Lq]`` and ``[B, Lq]``.

    ``origin`` is None where a kernel has no use for it. Where keys lie in blocks of memory it is None too, and
    ``visible`` is ``[B, 1]``, how many keys the only query of each sequence sees.
    """

    visible: Any
    budget: Any
    origin: Any = None


class ScoreSettings(NamedTuple):
    """From q·k to a logit: the factor, and the limit of the scaled scores or None."""

    scale: Any
    softcap: Any = None


class Shape(NamedTuple):
    """The constants of a program: ``head_dim``s of keys and of values, rows, keys in a tile, padded ``head_dim``s.

    Scores are summed over ``CHUNK_D`` channels at a time; where that is ``BLOCK_D``, queries are held in registers.
    """

    D: Any
    DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    CHUNK_D: Any


def heads(tensor: torch.Tensor) -> Heads:
    """The structure for a tensor ``[B, H, L, D]`` whose last axis is dense."""
    return Heads(tensor, *tensor.stride()[:3])


@lru_cache(maxsize=1024, typed=True)
def constants(values: NamedTuple) -> Any:
    """The same structure with each of its members as a compile-time constant; the same object for equal ones.

    Triton finds a compiled kernel by comparing constants: quick where they are the same object, and slow otherwise.
    """
    return type(values)(*map(tl.constexpr, values))


class Matrix(NamedTuple):
    """One head of ``Heads``: a pointer to its first row, and the distance between rows."""

    data: Any
    stride: Any


class Rows(NamedTuple):
    """The rows of a program; see ``rows.program_rows``.

    Attributes:
        batch, kv_head: one for all rows. index, head: of the query. row: the offset in a contiguous ``[B, Hq, Lq]``.
        valid: whether there is such a row.
        start, end: the keys it sees. wanted: its budget, at most ``end - start``.
    """

    batch: Any
    kv_head: Any
    index: Any
    head: Any
    row: Any
    valid: Any
    start: Any
    end: Any
    wanted: Any


class Queries(NamedTuple):
    """The queries of a program: a tile ``[BLOCK_M, BLOCK_D]`` (see ``scores.load_queries``), pointers, which exist."""

    tile: Any
    rows: Any
    valid: Any


class Softmax(NamedTuple):
    """A running softmax in base 2: weighted values ``[BLOCK_M, BLOCK_DV]``, the largest logit, the sum of weights.

    Weights and values are relative to ``2 ** finite_or_zero(peak)``.
    """

    acc: Any
    peak: Any
    total: Any


class Limits(NamedTuple):
    """Pointers to a score for each row of a contiguous ``[B, Hq, Lq]``, and where the keys that equal it end.

    A row attends the keys that score above ``threshold`` and, at positions below ``ties_end``, those that equal it.
    """

    threshold: Any
    ties_end: Any


class Selected(NamedTuple):
    """Which of the keys ``[start, end)`` each row attends: see ``rows.attended_keys``.

    Those below ``sinks_end``, those from ``recents_start`` on, and by score those that its ``Limits`` admit; the last
    two are None where none is attended by its score.
    """

    start: Any
    end: Any
    sinks_end: Any
    recents_start: Any
    threshold: Any = None
    ties_end: Any = None
