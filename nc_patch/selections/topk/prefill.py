"""Exact token-level top-k attention in two Triton kernels; ``reference.py`` defines what it computes.

A program of either kernel takes a block of rows of one key/value head and runs over the keys that any of them sees.
Scores are recomputed wherever they are needed, so that nothing of size Lq * Lk is ever stored:

1. ``threshold_kernel`` scores one tile of evenly spaced keys, for a first guess, and then counts the candidates above
   three thresholds per row in pass after pass, until every row of the block has its exact threshold, and writes 8 bytes
   per row. At most 25 counting passes, and one more where ties are cut short; none where every budget covers the row's
   interval.
2. ``attend_kernel`` accumulates, in one pass, the softmax of the attended keys times V. With statistics asked for, one
   more pass over K gives the dense log-sum-exp. ``ops.triton.tail`` describes what a tail adds.

So with p counting passes a block reads K p + 1 times and V once, and each pair of a query and a visible key costs
2 * D * (p + 1) + 2 * Dv floating point operations in matrix products. A program works on one block of rows of one
sequence, so decoding one token runs B * Hkv programs, which fill no large GPU.
"""

from nc_patch.ops.triton.launch import RowLaunch
from nc_patch.ops.triton.structs import Limits
from nc_patch.selections.topk.threshold import threshold_kernel


def find_limits(launch: RowLaunch, limits: Limits) -> None:
    """Launches the search that writes each row's threshold."""
    launch.run(threshold_kernel, limits=limits)
