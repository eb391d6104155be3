"""``block`` while decoding where keys lie in blocks of memory, as serving engines keep them.

A sequence's keys are named by a table of blocks; its first key is the first of its first block. The statistics of a
page lie beside its keys, so that they move with the block. A row attends what ``patch_model(..., decode="block")``
attends for its sequence alone.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nc_patch.common import check_choice
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.problem import DTYPES, AttentionResult, Problem, describe
from nc_patch.selections.block.blocks import BLOCK_SIZES
from nc_patch.selections.block.pages import VECTORS, PageStatistics, summarize
from nc_patch.selections.block.torch_decode import torch_block_decode


class PagedKeys(NamedTuple):
    """One layer's keys and values in blocks of memory, with the statistics of their pages (``PageStatistics``).

    Attributes:
        key: ``[blocks, Hkv, N, D]``, N keys a block, a multiple of the page size. value: ``[blocks, Hkv, N, Dv]``. Any
            strides, with the last axis dense.
        codes: int8 ``[blocks, Hkv, N // page_size, 3, D]``. scales: float32 ``[blocks, Hkv, N // page_size, 3]``. Any
            strides, with the vectors of a page side by side.
    """

    key: torch.Tensor
    value: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor


def summarize_slots_(paged: PagedKeys, slots: torch.Tensor, page_size: int, backend: str = "auto") -> None:
    """Writes the statistics of each page whose last key is new; the page's keys are all in ``paged.key`` by then.

    Args:
        slots: int64 ``[T]``, for each new key ``block * N`` plus its place in the block; negative for padding.

    Raises:
        ValueError: tensors that do not fit each other or the page size. RuntimeError: a backend that cannot run here.
    """
    _check_paged(page_size, *_layouts(paged))
    if slots.dtype != torch.int64 or slots.ndim != 1 or slots.device != paged.key.device:
        raise ValueError(f"slots must be int64 [T] on {paged.key.device}, got {describe(slots)}")
    choose_backend(backend, slots.device, head_dims=paged.key.shape[-1:], implemented=("torch",))
    last = slots[(slots >= 0) & (slots % page_size == page_size - 1)]
    block, page = last // paged.key.shape[2], last % paged.key.shape[2] // page_size
    found = summarize(paged.key.unflatten(2, (-1, page_size))[block, :, page])
    paged.codes[block, :, page], paged.scales[block, :, page] = found


def paged_block_attention(
    query: torch.Tensor, paged: PagedKeys, table: torch.Tensor, lengths: torch.Tensor, budget: torch.Tensor, *,
    most: int, page_size: int, scale: float, softcap: float = 0.0, sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> AttentionResult:  # fmt: skip
    """Attention of each row over the pages that it chooses by their statistics, as ``definition.page_mask`` says.

    Nothing is read beyond a row's length, nor of blocks that its table does not name for it.

    Args:
        query: ``[R, Hq, D]``, a row for each query token; several may be of one sequence.
        table: int32 ``[R, M]``, the blocks of each row's sequence; what follows those of its length may be anything.
        lengths: int32 ``[R]``, how many keys each row sees, its own included.
        budget: int32 ``[R, Hq or 1]``, how many keys each row attends, none more than ``most``.
        sinks: ``[Hq]``, learned logits that join the softmax's denominator, or None.

    Returns:
        Output ``[R, Hq, Dv]`` and attended int32 ``[R, Hq]``; zeros for a row of length 0.

    Raises:
        ValueError: tensors that do not fit each other or the page size. RuntimeError: a backend that cannot run here.
    """
    _check_paged(page_size, *_layouts(paged))
    _check_rows(*_layouts((query, table, lengths, budget)), *_layouts((paged.key,)))
    if sinks is not None and (sinks.shape != query.shape[1:2] or sinks.device != query.device):
        raise ValueError(f"sinks must be [{query.shape[1]}] on {query.device}, got {describe(sinks)}")
    head_dims = (paged.key.shape[-1], paged.value.shape[-1])
    choose_backend(backend, query.device, head_dims=head_dims, implemented=("torch",))
    R, Hq, _ = query.shape
    N = paged.key.shape[2]
    output = query.new_zeros(R, Hq, paged.value.shape[-1])
    attended = torch.zeros(R, Hq, dtype=torch.int32, device=query.device)
    for r, length in enumerate(lengths.tolist()):
        if length <= 0:
            continue
        blocks = table[r, : -(-length // N)]
        key, value, codes, scales = (t[blocks].transpose(0, 1).flatten(1, 2)[None] for t in paged)
        row = slice(r, r + 1)
        visible = torch.tensor([[[0, length]]], dtype=torch.int32, device=query.device)
        found = torch_block_decode(
            Problem(
                query[row, :, None], key, value, visible, visible[..., 0], budget[row, :, None].contiguous(), scale,
                softcap, sinks, key_index=PageStatistics(codes, scales), page_size=page_size, most=most,
            )
        )  # fmt: skip
        assert found.attended is not None
        output[r], attended[r] = found.output[0, :, 0], found.attended[0, :, 0]
    return AttentionResult(output, attended=attended)


def _layouts(tensors: tuple[torch.Tensor, ...]) -> list[tuple[Any, ...]]:
    """What is checked of tensors, as a key."""
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


@lru_cache(maxsize=256)
def _check_paged(page_size: int, *layouts: tuple[Any, ...]) -> None:
    """Raises ValueError unless blocks of these layouts fit each other and the page size."""
    check_choice("page_size", page_size, BLOCK_SIZES)
    (key, _, dtype, device), (value, *_), *_ = layouts
    if len(key) != 4 or len(value) != 4 or key[:3] != value[:3] or dtype not in DTYPES:
        raise ValueError(
            "key must be [blocks, Hkv, N, D] and value [blocks, Hkv, N, Dv], bfloat16, float16 or float32, got "
            f"{dtype} {list(key)} and {list(value)}"
        )
    if key[2] % page_size:
        raise ValueError(f"a block must hold a multiple of page_size {page_size} keys, got {key[2]}")
    of_pages = (*key[:2], key[2] // page_size, VECTORS)
    for name, layout, dense, shape, wanted in (
        ("key", layouts[0], 1, key, dtype),
        ("value", layouts[1], 1, value, dtype),
        ("codes", layouts[2], 2, (*of_pages, key[3]), torch.int8),
        ("scales", layouts[3], 1, of_pages, torch.float32),
    ):
        strides = (shape[-1], 1)[-dense:]
        if layout != (shape, layout[1], wanted, device) or layout[1][-dense:] != strides:
            raise ValueError(
                f"{name} must be {wanted} {list(shape)} on {device} with strides that end with {list(strides)}, got "
                f"{layout[2]} {list(layout[0])} on {layout[3]} with strides {list(layout[1])}"
            )


@lru_cache(maxsize=256)
def _check_rows(*layouts: tuple[Any, ...]) -> None:
    """Raises ValueError unless query, table, lengths and budget of these layouts fit each other and the keys, last."""
    query, table, lengths, budget, (key, _, dtype, device) = layouts
    if len(query[0]) != 3 or query[0][2] != key[3] or query[0][1] % key[1] or query[0][1] == 0:
        raise ValueError(
            f"query must be [R, Hq, {key[3]}], Hq a multiple of the {key[1]} key/value heads, got {list(query[0])}"
        )
    if query[2] != dtype or query[3] != device:
        raise ValueError(f"query must be {dtype} on {device} as the keys are, got {query[2]} on {query[3]}")
    R, Hq, _ = query[0]
    for name, layout, shapes in (
        ("table", table, [(R, *table[0][1:2])]),
        ("lengths", lengths, [(R,)]),
        ("budget", budget, [(R, Hq), (R, 1)]),
    ):
        if layout[0] not in shapes or layout[2] != torch.int32 or layout[3] != device:
            allowed = "[R, M]" if name == "table" else " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{name} must be int32 {allowed} on {device} for {R} rows, got {layout[2]} {list(layout[0])} on "
                f"{layout[3]}"
            )
