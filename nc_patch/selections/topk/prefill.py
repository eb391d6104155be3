"""Exact token-level top-k attention in two Triton kernels; ``reference.py`` defines what it computes.

A program of either kernel takes a block of rows of one key/value head and runs over the keys that any of them sees.
Scores are recomputed wherever they are needed, so that nothing of size Lq * Lk is ever stored:

1. ``threshold_kernel`` scores one tile of evenly spaced keys, for a first guess, and then counts the candidates above
   three thresholds per row in pass after pass, until every row of the block has its exact threshold, and writes 8 bytes
   per row. At most 25 counting passes, and one more where ties are cut short; none where every budget covers the row's
   interval.
2. ``attend_kernel`` accumulates, in one pass, the softmax of the attended keys times V. With statistics asked for, one
   more pass over K gives the dense log-sum-exp. With a tail ``tail.attend_tail_kernel`` takes its place.

So with p counting passes a block reads K p + 1 times and V once, and each pair of a query and a visible key costs
2 * D * (p + 1) + 2 * Dv floating point operations in matrix products. Where V holds NaN or infinity, the blocks that
read it are computed again, 32 columns of V at a time. A program works on one block of rows of one sequence, so decoding
one token runs B * Hkv programs, which fill no large GPU.
"""

import torch

from nc_patch.ops.means import PageMeans
from nc_patch.ops.triton.launch import launch_attention


def triton_topk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query over its ``sink_keys`` first, ``recent_keys`` last and highest scoring keys, k in all.

    Args:
        query: ``[B, Hq, Lq, D]`` in bfloat16, float16 or float32. key: ``[B, Hkv, Lk, D]``. value:
            ``[B, Hkv, Lk, Dv]``. One dtype, D and Dv at most 256, any strides.
        visible: int32 ``[B, Lq, 2]``, the half-open interval of keys each query may see.
        budget: int32 ``[B, Hq or 1, Lq]``, k of each row.
        sinks: ``[Hq]`` learned logits that join the softmax's denominator, or None.
        scale: factor of q·k, positive. softcap: limit of the scaled scores, 0 for none.
        want_stats: whether to return the log-sum-exp and the kept mass.
        tail: the means by which keys that are not attended enter, with the ``origin`` int32 ``[B, Lq]`` of each query's
            sequence; None to drop them.

    Returns:
        (output, lse, kept_mass): ``[B, Hq, Lq, Dv]`` in the query's dtype, and float32 ``[B, Hq, Lq]`` twice; the last
        two are empty unless ``want_stats``.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernel does not take.
    """
    return launch_attention(
        query,
        key,
        value,
        visible,
        budget,
        sinks,
        by_score=True,
        scale=scale,
        softcap=softcap,
        sink_keys=sink_keys,
        recent_keys=recent_keys,
        want_stats=want_stats,
        tail=tail,
        origin=origin,
    )
