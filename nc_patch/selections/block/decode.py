"""``block`` while decoding, in four launches; ``definition.page_mask`` defines what it computes.

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

from dataclasses import dataclass

import torch
import triton

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton.launch import Tiles as RowTiles
from nc_patch.ops.triton.launch import (
    architecture_of,
    compile_options,
    kept_mass_of,
    on_device,
    padded_dim,
    prepared,
    settings_of,
    shape_of,
)
from nc_patch.ops.triton.split import combine_splits, padded_splits, share
from nc_patch.ops.triton.structs import RowInputs, heads
from nc_patch.selections.block.decode_kernels import (
    Pages,
    Sums,
    attend_pages_kernel,
    choose_pages_kernel,
    score_pages_kernel,
)
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


def triton_block_decode(problem: Problem) -> AttentionResult:
    """Attention of each query over the pages that it chooses by their statistics; no budget is larger than ``most``.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. The kept mass costs
    as much as dense attention.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take, or more than ``MAX_PAGES`` pages.
    """
    problem = prepared(problem)
    _check_pages(problem)
    block_size, want_stats = problem.page_size, problem.stats
    B, Hq, Lq, D = problem.query.shape
    Hkv, Lk, DV = problem.value.shape[1:]
    group = problem.group
    page_codes, page_scales = problem.key_index
    # A query's pages: those that a run of at most Lk keys can touch.
    width = max(1, min(page_codes.shape[2], page_count(Lk, block_size) + 1))
    if width > MAX_PAGES:
        larger = block_size * -(-width // MAX_PAGES)
        raise ValueError(f"at most {MAX_PAGES} pages can be chosen from, got {width}: use block_size >= {larger}")
    device, architecture = problem.query.device, architecture_of(problem.query.device)
    tiles = decode_tiles(architecture, problem.query.dtype, D, DV)
    query, key, value = problem.query, problem.key, problem.value
    inputs = RowInputs(problem.visible, problem.budget, problem.origin)
    attended = torch.empty(B, Hq, Lq, dtype=torch.int32, device=device)
    output = torch.empty(B, Hq, Lq, DV, dtype=query.dtype, device=device)
    lse, lse_keys = (
        torch.empty(B, Hq, Lq, dtype=torch.float32, device=device) if want_stats else None for _ in range(2)
    )
    numbers = B * Lq * Hkv
    if numbers == 0 or DV == 0:
        return AttentionResult(output, lse, lse_keys, attended)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    capacity = min(-(-problem.most // block_size) + 2, width)
    head_blocks = triton.cdiv(group, _HEADS)
    score_splits = share(tiles.scorers, numbers * head_blocks, triton.cdiv(width, tiles.score.keys))
    splits = share(tiles.attenders, numbers * head_blocks, triton.cdiv(capacity * block_size, tiles.attend.keys))
    page_logits = scratch(numbers, group, width)
    page_sums = Sums(*(scratch(numbers, group, score_splits + 1) for _ in range(2)))
    sums = Sums(*(scratch(B * Hq * Lq, splits, *last) for last in ((), (), (DV,))))
    pages = Pages(scratch(numbers, capacity, dtype=torch.int32), scratch(numbers, dtype=torch.int32), attended)
    common = {
        "inputs": inputs,
        "num_kv_heads": Hkv,
        "group": group,
        "Lq": Lq,
        "Lk": Lk,
        "BLOCK_SIZE": block_size,
    }
    scored = {"query": heads(query), "key": heads(key), "settings": settings_of(problem)}
    at_once = min(_CHOOSE_AT_ONCE, max(128, triton.next_power_of_2(width)))
    with on_device(device):
        score_pages_kernel[(numbers, score_splits + 1, head_blocks)](
            codes=page_codes,
            scales=page_scales,
            page_logits=page_logits,
            sums=page_sums,
            stored_pages=page_codes.shape[2],
            width=width,
            splits=score_splits,
            shape=shape_of(D, D, tiles.score),
            BLOCK_K=max(16, triton.next_power_of_2(block_size)),
            **common,
            **scored,
            **compile_options(tiles.score, architecture),
        )
        choose_pages_kernel[(numbers,)](
            page_logits=page_logits,
            sums=page_sums,
            pages=pages,
            budget_heads=problem.budget.shape[1],
            width=width,
            splits=score_splits + 1,
            capacity=capacity,
            BLOCK_P=at_once,
            BLOCK_S=padded_splits(score_splits + 1),
            **common,
            # At most 16 pages a thread at a time.
            **compile_options(RowTiles(1, at_once, max(4, at_once // 512), 1), architecture),
        )
        attend_pages_kernel[(numbers, splits, head_blocks)](
            value=heads(value),
            pages=pages,
            sums=sums,
            splits=splits,
            capacity=capacity,
            shape=shape_of(D, DV, tiles.attend),
            **common,
            **scored,
            **compile_options(tiles.attend, architecture),
        )
    combine_splits(sums.acc, sums.peak, sums.total, problem.sinks, attended, output, lse, lse_keys)
    kept_mass = None if lse_keys is None else kept_mass_of(problem, lse_keys)
    return AttentionResult(output, lse, kept_mass, attended)


def _check_pages(problem: Problem) -> None:
    codes, scales = problem.key_index
    B, Hkv, _, D = problem.key.shape
    P = codes.shape[2] if codes.ndim == 5 else 0
    for name, tensor, dtype, shape in (
        ("page_codes", codes, torch.int8, (B, Hkv, P, VECTORS, D)),
        ("page_scales", scales, torch.float32, (B, Hkv, P, VECTORS)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
