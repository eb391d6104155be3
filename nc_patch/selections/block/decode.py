"""``block`` while decoding, in four launches; ``reference.page_mask`` defines what it computes.

1. Score: the statistics are read once for the query heads of a group: ``3 * D + 12`` bytes for each visible page and
   key/value head, and a float32 logit written for each query head.
2. Choose: one program for a query and group reads the logits once, writes the pages' weights over the first
   head's, and finds the cut by bisection, reading them back from the cache; it writes the list of pages.
3. Attend: the list is divided among programs, which gather ``2 * (D + Dv)`` bytes in 16 bits for each attended key.
4. Combine: see ``split``.

One layer of Llama-3-8B (Hq 32, Hkv 8, D 128, bfloat16, batch 1), pages of 32, 4,705 keys, at 131,072 keys: statistics
13.0 MB, logits 0.5 MB written and read, K and V 19.3 MB, partial sums 1.1 MB written and read: 36 MB against 537 MB
for dense attention. Nothing is read back to the host and every size follows from shapes and host integers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from nc_patch.ops.triton.launch import Tiles as RowTiles
from nc_patch.ops.triton.launch import (
    architecture_of,
    check_inputs,
    compile_options,
    dense_last,
    launch_attention,
    padded_dim,
)
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton.split import combine_splits, padded_splits, share
from nc_patch.selections.block.page_attend import attend_pages_kernel
from nc_patch.selections.block.page_choice import choose_pages_kernel
from nc_patch.selections.block.page_score import score_pages_kernel
from nc_patch.selections.block.pages import VECTORS, page_count

# Counts of pages have 21 bits.
MAX_PAGES = 2**21 - 1
_CHOOSE_AT_ONCE = 4096
_HEADS = 16


@dataclass(frozen=True)
class DecodeTiles:
    """Tile sizes of one step: of pages scored at once and of keys attended at once.

    Attributes:
        scorers, attenders: programs of each kernel that a multiprocessor holds at once, by their registers.
    """

    score: RowTiles
    attend: RowTiles
    scorers: int
    attenders: int


def decode_tiles(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> DecodeTiles:
    """The one place where tile sizes of decoding over pages are chosen."""
    widest = max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        tile = RowTiles(_HEADS, 32, 8 if widest > 128 else 4, 1, 32)
        return DecodeTiles(tile, tile, 8 // tile.warps, 8 // tile.warps)
    keys, at_once = (32, 2) if widest > 128 else (64, 3)
    # Channels beyond the head_dim are masked, which takes registers.
    scorers = at_once if head_dim == padded_dim(head_dim) else 2
    return DecodeTiles(RowTiles(_HEADS, 32, 4, 1), RowTiles(_HEADS, keys, 4, 2), scorers, at_once)


def triton_block_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    page_codes: torch.Tensor,
    page_scales: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    block_size: int,
    max_budget: int,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query over the pages that it chooses by their statistics.

    Args:
        query: ``[B, Hq, Lq, D]``, Lq small. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``. One dtype of
            bfloat16, float16 and float32, any strides.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``, where each query's sequence begins; may be negative.
        budget: int32 ``[B, Hq or 1, Lq]``. max_budget: an upper bound of it.
        sinks: ``[Hq]`` learned logits that join the softmax's denominator, or None.
        page_codes: int8 ``[B, Hkv, P, 3, D]``. page_scales: float32 ``[B, Hkv, P, 3]``; see ``PageStatistics``. What
            lies beyond a query's own page is not read.
        scale: factor of the scores. softcap: 0 for none. block_size: keys per page.
        want_stats: whether lse and kept mass are wanted; the kept mass costs as much as dense attention.

    Returns:
        (output ``[B, Hq, Lq, Dv]``, lse and kept mass float32 ``[B, Hq, Lq]`` or empty, attended int32 ``[B, Hq,
        Lq]``).

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take, or more than ``MAX_PAGES`` pages.
    """
    check_inputs(query, key, value, visible, budget, sinks)
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group = Hq // Hkv
    _check_pages(origin, page_codes, page_scales, key, Lq)
    # A query's pages: those that a run of at most Lk keys can touch.
    width = max(1, min(page_codes.shape[2], page_count(Lk, block_size) + 1))
    if width > MAX_PAGES:
        larger = block_size * -(-width // MAX_PAGES)
        raise ValueError(f"at most {MAX_PAGES} pages can be chosen from, got {width}: use block_size >= {larger}")
    device, architecture = query.device, architecture_of(query.device)
    tiles = decode_tiles(architecture, query.dtype, D, DV)
    query, key, value, page_scales = (dense_last(x) for x in (query, key, value, page_scales))
    if page_codes.stride()[3:] != (D, 1):
        page_codes = page_codes.contiguous()
    visible = dense_last(visible)
    attended = torch.empty(B, Hq, Lq, dtype=torch.int32, device=device)
    output = torch.empty(B, Hq, Lq, DV, dtype=query.dtype, device=device)
    lse = torch.empty((B, Hq, Lq) if want_stats else (0,), dtype=torch.float32, device=device)
    lse_keys, kept_mass = torch.empty_like(lse), torch.empty_like(lse)
    numbers = B * Lq * Hkv
    if numbers == 0 or DV == 0:
        return output, lse, kept_mass, attended

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    capacity = min(-(-max_budget // block_size) + 2, width)
    head_blocks = triton.cdiv(group, _HEADS)
    score_splits = share(tiles.scorers, numbers * head_blocks, triton.cdiv(width, tiles.score.keys))
    splits = share(tiles.attenders, numbers * head_blocks, triton.cdiv(capacity * block_size, tiles.attend.keys))
    page_logits = scratch(numbers, group, width)
    page_peak, page_total = scratch(numbers, group, score_splits + 1), scratch(numbers, group, score_splits + 1)
    chosen, chosen_count = scratch(numbers, capacity, dtype=torch.int32), scratch(numbers, dtype=torch.int32)
    acc, peak, total = (scratch(B * Hq * Lq, splits, *last) for last in ((DV,), (), ()))
    interval = (*visible.stride()[:2], *origin.stride())
    sizes = (Hkv, group, Lq, Lk)
    budget_strides = (budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1), budget.stride(2))
    query_key = (*query.stride()[:3], *key.stride()[:3])
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        score_pages_kernel[(numbers, score_splits + 1, head_blocks)](
            *(query, key, page_codes, page_scales, visible, origin, page_logits, page_peak, page_total, *query_key),
            *(
                *page_codes.stride()[:3],
                *page_scales.stride()[:3],
                *interval,
                *sizes,
                width,
                score_splits,
                scale,
                softcap,
            ),
            **score_constants(D, block_size, tiles.score, softcap > 0),
            **compile_options(tiles.score, architecture),
        )
        choose_pages_kernel[(numbers,)](
            *(visible, origin, budget, page_logits, page_peak, page_total, chosen, chosen_count, attended),
            *(*interval, *budget_strides, *sizes, width, score_splits + 1, capacity),
            **choose_constants(width, score_splits + 1, block_size),
            **choose_options(width, architecture),
        )
        attend_pages_kernel[(numbers, splits, head_blocks)](
            *(query, key, value, visible, origin, chosen, chosen_count, acc, peak, total, *query_key),
            *(*value.stride()[:3], *interval, *sizes, splits, capacity, scale, softcap),
            **attend_constants(D, DV, block_size, tiles.attend, softcap > 0),
            **compile_options(tiles.attend, architecture),
        )
    combine_splits(acc, peak, total, sinks, attended, output, lse, lse_keys)
    if want_stats:
        seen = (visible[..., 1].clamp(max=Lk) - visible[..., 0].clamp(min=0)).clamp(min=0).to(torch.int32)[:, None]
        _, dense, _ = launch_attention(
            *(query, key, value, visible, seen.contiguous(), None),
            by_score=False, scale=scale, softcap=softcap, sink_keys=0, recent_keys=0, want_stats=True,
        )  # fmt: skip
        kept_mass = torch.where(seen > 0, torch.exp(lse_keys - dense), 1.0)
    return output, lse, kept_mass, attended


def _check_pages(
    origin: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, key: torch.Tensor, queries: int
) -> None:
    B, Hkv, _, D = key.shape
    if origin.dtype != torch.int32 or tuple(origin.shape) != (B, queries):
        raise ValueError(f"origin must be int32 [{B}, {queries}], got {origin.dtype} {list(origin.shape)}")
    P = codes.shape[2] if codes.ndim == 5 else 0
    for name, tensor, dtype, shape in (
        ("page_codes", codes, torch.int8, (B, Hkv, P, VECTORS, D)),
        ("page_scales", scales, torch.float32, (B, Hkv, P, VECTORS)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def score_constants(head_dim: int, block_size: int, tiles: RowTiles, has_softcap: bool) -> dict[str, Any]:
    """The compile-time arguments of ``score_pages_kernel``."""
    padded = padded_dim(head_dim)
    return {
        "D": head_dim,
        "BLOCK_G": tiles.rows,
        "BLOCK_P": tiles.keys,
        "BLOCK_K": max(16, triton.next_power_of_2(block_size)),
        "BLOCK_D": padded,
        "CHUNK_D": min(padded, tiles.chunk or padded),
        "BLOCK_SIZE": block_size,
        "HAS_SOFTCAP": has_softcap,
    }


def choose_constants(width: int, splits: int, block_size: int) -> dict[str, Any]:
    """The compile-time arguments of ``choose_pages_kernel``."""
    return {
        "BLOCK_P": min(_CHOOSE_AT_ONCE, max(128, triton.next_power_of_2(width))),
        "BLOCK_S": padded_splits(splits),
        "BLOCK_SIZE": block_size,
    }


def choose_options(width: int, architecture: str) -> dict[str, Any]:
    """Options of the compiler for ``choose_pages_kernel``: at most 16 pages a thread at a time."""
    at_once = choose_constants(width, 1, 1)["BLOCK_P"]
    return compile_options(RowTiles(1, at_once, max(4, at_once // 512), 1), architecture)


def attend_constants(
    head_dim: int, value_dim: int, block_size: int, tiles: RowTiles, has_softcap: bool
) -> dict[str, Any]:
    """The compile-time arguments of ``attend_pages_kernel``."""
    padded = padded_dim(head_dim)
    return {
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_G": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": padded,
        "BLOCK_DV": padded_dim(value_dim),
        "CHUNK_D": min(padded, tiles.chunk or padded),
        "BLOCK_SIZE": block_size,
        "HAS_SOFTCAP": has_softcap,
    }


def specialisations(target: str) -> Iterator[Specialisation]:
    """Each head_dim and dtype of the kernels that score and attend, and sizes of the one that chooses."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    for dtype, D, block_size, softcap in (
        (bfloat16, 64, 16, False),
        (bfloat16, 128, 32, False),
        (bfloat16, 128, 128, True),
        (bfloat16, 256, 128, True),
        (torch.float16, 96, 64, False),
        (float32, 128, 128, True),
        (float32, 256, 32, False),
    ):
        tiles = decode_tiles(target, dtype, D, D)
        suffix = f"{DTYPE_NAMES[dtype]}-d{D}-p{block_size}" + ("-softcap" if softcap else "")
        types = {
            **dict.fromkeys(("query", "key", "value"), pointer_to(dtype)),
            "codes": "*i8",
            **dict.fromkeys(("scales", "page_logits", "peak", "total", "acc"), "*fp32"),
            **dict.fromkeys(("visible", "origin", "chosen", "chosen_count"), "*i32"),
            **dict.fromkeys(("stride_kb", "stride_vb"), "i64"),
        }
        for name, kernel, constants, tile in (
            ("score_pages", score_pages_kernel, score_constants(D, block_size, tiles.score, softcap), tiles.score),
            (
                "attend_pages",
                attend_pages_kernel,
                attend_constants(D, D, block_size, tiles.attend, softcap),
                tiles.attend,
            ),
        ):
            options = compile_options(tile, target)
            aligned = data_strides(kernel, "qkvc")
            yield Specialisation(f"{name}-{suffix}", kernel, constants, types, options, aligned)
    for pages in (1024, 4096):
        types = {
            **dict.fromkeys(("page_logits", "peak", "total"), "*fp32"),
            **dict.fromkeys(("visible", "origin", "budget", "chosen", "chosen_count", "attended"), "*i32"),
        }
        constants, options = choose_constants(pages, 65, 32), choose_options(pages, target)
        yield Specialisation(f"choose_pages-{pages}", choose_pages_kernel, constants, types, options)
