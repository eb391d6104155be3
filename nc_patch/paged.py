"""``block`` while decoding where keys lie in blocks of memory, as serving engines keep them.

A sequence's keys are named by a table of blocks, from the first of its first block on. The statistics of a page lie
beside its keys. A row attends what ``patch_model(..., decode="block")`` attends for its sequence alone.
"""

from typing import NamedTuple

import torch

from nc_patch.common import check_choice, once
from nc_patch.ops.backends import BACKENDS, choose_backend
from nc_patch.ops.problem import AttentionResult, Problem, describe
from nc_patch.selections import Block
from nc_patch.selections.block.pages import PageStatistics, check_blocks, check_table, summarize

_BLOCK = Block()


class PagedKeys(NamedTuple):
    """One layer's keys and values in blocks of memory, with the statistics of their pages (``PageStatistics``).

    Attributes:
        key, value: ``[blocks, Hkv, N, D or Dv]``, N keys a block, a multiple of the page size; the last axis is dense.
        codes: int8 ``[blocks, Hkv, N // page_size, 3, D]``, the vectors of a page side by side.
        scales: float32 ``[blocks, Hkv, N // page_size, 3]``, the last axis dense.
        page_size: keys of a page.
    """

    key: torch.Tensor
    value: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    page_size: int


class PagedRows(NamedTuple):
    """What rows see and attend, each for a query token; several may be of one sequence.

    Attributes:
        table: int32 ``[R, M]``, the blocks of each row's sequence; what follows those of its length may be anything.
        lengths: int32 ``[R]``, how many keys each row sees, its own included.
        budget: int32 ``[R, Hq or 1]``, how many keys each row attends, none more than ``most``.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    budget: torch.Tensor
    most: int

    @property
    def visible(self) -> torch.Tensor:
        """int32 ``[R, 1, 2]``, the interval of keys that each row sees; worked out once for all layers."""
        from_first = lambda: torch.nn.functional.pad(self.lengths[:, None, None], (1, 0))  # noqa: E731
        found: torch.Tensor = once(self.lengths, ("visible",), from_first)
        return found


def summarize_slots_(paged: PagedKeys, slots: torch.Tensor, backend: str = "auto") -> None:
    """Writes the statistics of each page whose last key is new; the page's keys are all in ``paged.key`` by then.

    Args:
        slots: int64 ``[T]``, for each new key ``block * N`` plus its place in the block; negative for padding.

    Raises:
        ValueError: tensors that do not fit each other or the page size. RuntimeError: a backend that cannot run here.
    """
    check_blocks(*paged)
    if slots.dtype != torch.int64 or slots.ndim != 1 or slots.device != paged.key.device:
        raise ValueError(f"slots must be int64 [T] on {paged.key.device}, got {describe(slots)}")
    chosen, update = _backend(backend, paged), _summarize_slots_
    if chosen == "triton":
        from nc_patch.selections.block.summarize import triton_summarize_slots_ as update
    elif chosen == "cpu":
        from nc_patch.selections.block.cpu_decode import cpu_summarize_slots_ as update
    update(paged.key, PageStatistics(paged.codes, paged.scales), slots, paged.page_size)


def paged_block_attention(
    query: torch.Tensor, paged: PagedKeys, rows: PagedRows, *, scale: float, softcap: float = 0.0,
    sinks: torch.Tensor | None = None, backend: str = "auto",
) -> AttentionResult:  # fmt: skip
    """Attention of each row over the pages that it chooses by their statistics, as ``definition.page_mask`` says.

    Nothing is read beyond a row's length, nor of blocks that its table does not name for it.

    Args:
        query: ``[R, Hq, D]``.
        sinks: ``[Hq]``, learned logits that join the softmax's denominator, or None.

    Returns:
        Output ``[R, Hq, Dv]`` and attended int32 ``[R, Hq]``; zeros for a row of length 0.

    Raises:
        ValueError: tensors that do not fit each other or the page size. RuntimeError: a backend that cannot run here.
    """
    if query.ndim != 3:
        raise ValueError(f"query must be [R, Hq, D], got {describe(query)}")
    query = query if query.stride(2) == 1 else query.contiguous()
    problem = Problem(
        query.unsqueeze(2), paged.key, paged.value, rows.lengths.unsqueeze(-1).contiguous(), rows.lengths,
        rows.budget.unsqueeze(-1).contiguous(), scale, softcap, sinks, key_index=(paged.codes, paged.scales),
        page_size=paged.page_size, most=rows.most, table=rows.table,
    )  # fmt: skip
    chosen = _backend(backend, paged)
    if chosen != "triton":  # there only what is not alike is checked
        check_table(problem)
    found = _BLOCK.run(problem, chosen)
    assert found.attended is not None
    return found._replace(output=found.output[:, :, 0], attended=found.attended[:, :, 0])


def _summarize_slots_(key: torch.Tensor, statistics: PageStatistics, slots: torch.Tensor, block_size: int) -> None:
    """``summarize_slots_`` in PyTorch."""
    last = slots[(slots >= 0) & (slots % block_size == block_size - 1)]
    block, page = last // key.shape[2], last % key.shape[2] // block_size
    found = summarize(key.unflatten(2, (-1, block_size))[block, :, page])
    statistics.codes[block, :, page], statistics.scales[block, :, page] = found


def _backend(requested: str, paged: PagedKeys) -> str:
    """The backend that runs a call."""
    check_choice("backend", requested, BACKENDS)
    head_dims = (paged.key.shape[-1], paged.value.shape[-1])
    return choose_backend(requested, paged.key.device, head_dims=head_dims)[0]
