"""How many bytes a decoding step must read and write at least, and how fast the machine copies.

Counted is what an implementation cannot avoid, each byte once: a step that takes ``bytes / bandwidth`` is as fast as
the machine's memory. What is read again, intermediate results and the budget's integers are not counted.
"""

import statistics

import torch

from nc_patch.bench.inputs import Geometry
from nc_patch.bench.timing import Prepared, seconds_of
from nc_patch.ops.means import TAIL_PAGE_SIZE, slot_count
from nc_patch.selections import Block, Selection, Window
from nc_patch.selections.block.pages import VECTORS

# Bytes of a codes index besides the codes, per key: scale and residual, in float32.
_CODE_NUMBERS = 8
# Bytes of a pages index besides the codes, per page: a float32 scale of each vector.
_PAGE_FLOATS = 4 * VECTORS
_COPIES = 7


def dense_bytes(geometry: Geometry, batch: int, length: int, itemsize: int) -> int:
    """Every key and every value once; query and output."""
    return batch * geometry.kv_heads * length * 2 * geometry.head_dim * itemsize + _ends(geometry, batch, itemsize)


def sparse_bytes(selection: Selection, geometry: Geometry, batch: int, length: int, budget: int, itemsize: int) -> int:
    """Bytes of a step of a selection, upkeep of its indexes included.

    Per sequence and key/value head, with n keys, G query heads in a group, budget k, head dimension D:

    - ``window``: keys and values of k positions, which the group shares.
    - ``block``: codes of the ``ceil(n / size)`` pages, ``3 * D + 12`` bytes each; keys and values of ``ceil(k / size)``
      of them, which the group shares; upkeep reads the keys of a page and writes its codes, once in ``size`` steps: a
      key, and the ``size``-th part of the codes, a step.
    - ``topk``: the codes of n keys, ``D + 8`` bytes each; keys and values of ``min(n, G * k)`` positions: what several
      heads of a group choose is counted once for each; upkeep reads a key and writes its code, ``D + 8`` bytes. The
      tail reads the means of ``ceil(n / 16)`` pages of keys and values, and its upkeep a key and a value, and writes
      the 16th part of their means, a step.

    Query and output come on top.
    """
    D, group = geometry.head_dim, geometry.heads // geometry.kv_heads
    row = D * itemsize
    if isinstance(selection, Window):
        per_head = budget * 2 * row
    elif isinstance(selection, Block):
        pages = -(-length // selection.size)
        chosen = min(length, -(-budget // selection.size) * selection.size)
        page = VECTORS * D + _PAGE_FLOATS
        per_head = pages * page + chosen * 2 * row + row + page // selection.size
    else:
        per_head = (length + 1) * (D + _CODE_NUMBERS) + min(length, group * budget) * 2 * row + row
        if selection.uses_means:
            per_head += slot_count(length) * 2 * row + 2 * row + 2 * row // TAIL_PAGE_SIZE
    return batch * geometry.kv_heads * per_head + _ends(geometry, batch, itemsize)


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes a second of a large copy within the device's memory, read and written both counted; the median of seven."""
    source = torch.empty(megabytes * (1 << 20) // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    prepared = Prepared(lambda: target.copy_(source), 1)
    return 2 * source.nbytes / statistics.median(seconds_of(prepared, device) for _ in range(_COPIES))


def _ends(geometry: Geometry, batch: int, itemsize: int) -> int:
    return 2 * batch * geometry.heads * geometry.head_dim * itemsize
