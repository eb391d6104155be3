"""Attention over the first and the most recent visible keys in one Triton kernel; ``reference.py`` defines it.

A program takes a block of rows of one key/value head and reads K and V once, in the tiles from its rows' first start to
their last sink key and in those from their first recent key on; a budget that covers the interval makes it dense
attention. With statistics asked for, one more pass over all visible K gives the dense log-sum-exp.
"""

import torch

from nc_patch.ops.triton_launch import launch_attention


def triton_window_attention(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query over its ``sink_keys`` first and its most recent visible keys, ``budget`` in all.

    Arguments, results and errors are those of ``triton_topk_attention``; ``recent_keys`` changes nothing, since
    whatever the budget leaves after the sinks is recent.
    """
    return launch_attention(
        query,
        key,
        value,
        visible,
        budget,
        sinks,
        by_score=False,
        scale=scale,
        softcap=softcap,
        sink_keys=sink_keys,
        recent_keys=recent_keys,
        want_stats=want_stats,
    )
