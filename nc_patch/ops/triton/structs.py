"""The structures that Triton kernels take, pass on and return: named tuples, the first of them built on the host.

A member that is None compiles what it would be used for out of the kernel; no function returns one, which Triton 3.6
cannot. Constants are members too, wrapped by ``tl.constexpr``. Integers for whose values no kernel is compiled
(``PER_CALL``) stay arguments of their own, since ``do_not_specialize`` does not reach into tuples. A program works on
``BLOCK_M`` rows; vectors of its rows are ``[BLOCK_M]``, tiles ``[BLOCK_M, BLOCK_N]``.
"""

from collections import namedtuple
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

# Arguments whose values no kernel is compiled for: prompts of any length share one variant.
PER_CALL = ("num_kv_heads", "group", "Lq", "Lk", "budget_heads", "sink_keys", "recent_keys")

# A tensor ``[B, H, L, D]`` with a dense last axis, of any other strides; see ``heads``.
Heads = namedtuple("Heads", "data stride_b stride_h stride_l")

# Where keys lie in blocks of memory: int32 rows of blocks, one for each sequence, and the step between rows.
Table = namedtuple("Table", "data stride")

# What is given for each query: contiguous int32 ``[B, Lq, 2]``, ``[B, 1 or Hq, Lq]`` and ``[B, Lq]``. ``origin`` is
# None where a kernel has no use for it. Where keys lie in blocks of memory it is None too, and ``visible`` is
# ``[B, 1]``, how many keys the only query of each sequence sees.
RowInputs = namedtuple("RowInputs", "visible budget origin", defaults=[None])

# From q·k to a logit: the factor, and the limit of the scaled scores or None.
ScoreSettings = namedtuple("ScoreSettings", "scale softcap", defaults=[None])

# The constants of a program: ``head_dim``s of keys and of values, rows, keys in a tile, padded ``head_dim``s. Scores
# are summed over ``CHUNK_D`` channels at a time; where that is ``BLOCK_D``, queries are held in registers.
Shape = namedtuple("Shape", "D DV BLOCK_M BLOCK_N BLOCK_D BLOCK_DV CHUNK_D")


def heads(tensor: torch.Tensor) -> Heads:
    """The structure for a tensor ``[B, H, L, D]`` whose last axis is dense."""
    return Heads(tensor, *tensor.stride()[:3])


@lru_cache(maxsize=1024, typed=True)
def constants(values: NamedTuple) -> Any:
    """The same structure with each of its members as a compile-time constant; the same object for equal ones.

    Triton finds a compiled kernel by comparing constants: quick where they are the same object, and slow otherwise.
    """
    return type(values)(*map(tl.constexpr, values))


# One head of ``Heads``: a pointer to its first row, and the distance between rows.
Matrix = namedtuple("Matrix", "data stride")

# The rows of a program; see ``rows.program_rows``. ``batch`` and ``kv_head`` are one for all rows; ``index`` and
# ``head`` are of the query; ``row`` is the offset in a contiguous ``[B, Hq, Lq]``; ``valid`` is whether there is such a
# row; ``start:end`` are the keys it sees, ``wanted`` is its budget, at most ``end - start``.
Rows = namedtuple("Rows", "batch kv_head index head row valid start end wanted")

# The queries of a program: a tile ``[BLOCK_M, BLOCK_D]`` (see ``scores.load_queries``), pointers, which exist.
Queries = namedtuple("Queries", "tile rows valid")

# A running softmax in base 2: weighted values ``[BLOCK_M, BLOCK_DV]``, the largest logit, the sum of weights. Weights
# and values are relative to ``2 ** finite_or_zero(peak)``.
Softmax = namedtuple("Softmax", "acc peak total")

# Pointers to a score for each row of a contiguous ``[B, Hq, Lq]``, and where the keys that equal it end. A row attends
# the keys that score above ``threshold`` and, at positions below ``ties_end``, those that equal it.
Limits = namedtuple("Limits", "threshold ties_end")

# Which of the keys ``[start, end)`` each row attends (``rows.attended_keys``): those below ``sinks_end``, those from
# ``recents_start`` on, and those that its ``Limits`` admit; the last two are None where none is attended by its score.
Selected = namedtuple("Selected", "start end sinks_end recents_start threshold ties_end")
