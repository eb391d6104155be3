"""``block`` while decoding, in three launches; ``definition.page_mask`` defines what it computes.

1. Score: the statistics, ``3 * D + 12`` bytes for each visible page and key/value head, are read once for a group; a
   float32 logit is written for each query head. A new key is taken into the statistics.
2. Choose: one program for a query and group writes the pages' weights over the first head's logits, finds the cut by
   bisection, and writes the list of pages.
3. Attend: the list is divided among programs; the last of a row joins what they leave: see ``split``.

Nothing is read back to the host and every size follows from shapes and host integers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton import launch
from nc_patch.ops.triton.decoding import Decoder, Launches, bound_decoder
from nc_patch.ops.triton.launch import Tiles
from nc_patch.ops.triton.split import padded_splits, share
from nc_patch.ops.triton.structs import RowInputs, Table, heads
from nc_patch.selections.block.decode_kernels import attend_pages_kernel, choose_pages_kernel, score_pages_kernel
from nc_patch.selections.block.pages import PageStatistics, check_pages, check_table
from nc_patch.selections.block.summarize import page_shape_of, score_tiles
from nc_patch.selections.index import extend

# Counts of pages have 21 bits.
MAX_PAGES = 2**21 - 1
_CHOOSE_AT_ONCE = 4096
# Steps with as many of these runs of keys share a plan.
_KEYS = 1024


def bound_block_decode(problem: Problem) -> Callable[[Problem], AttentionResult]:
    """Attention of problems like this one over the pages that each query chooses; see ``Selection.bound``.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. No budget is larger
    than ``problem.most``. ``problem.new`` is 0, or 1 where there is one query. The kept mass costs as much as dense
    attention.

    Raises:
        ValueError: statistics that do not fit the keys, or more than ``MAX_PAGES`` pages.
    """
    length, most = problem.key.shape[2], -(-problem.most // problem.page_size)
    keys = length if problem.table is not None else -(-length // _KEYS)
    take_in = partial(extend, kind="pages", backend="triton")
    return bound_decoder(_decoder, take_in, problem, keys, most)


def _decoder(problem: Problem) -> Decoder:
    """What decodes problems like this one, which it checks."""
    table, block_size, Lk = problem.table, problem.page_size, problem.key_length
    if table is None:
        codes, scales = problem.key_index
        check_pages(problem.key, codes, scales, codes.shape[2] if codes.ndim == 5 else 0)
    else:
        check_table(problem)
    query, key, value, group = problem.query, problem.key, problem.value, problem.group
    B, _, Lq, D = query.shape
    Hkv, _, DV = value.shape[1:]
    numbers, keys_stored = B * Lq * Hkv, 0 if table is None else key.shape[2]
    stored_pages = problem.key_index[0].shape[2] if table is None else triton.cdiv(Lk, block_size)
    # A query's pages: those that a run of at most Lk keys can touch.
    width = max(1, min(stored_pages, triton.cdiv(triton.cdiv(Lk, _KEYS) * _KEYS, block_size) + 1))
    if width > MAX_PAGES:
        larger = block_size * -(-width // MAX_PAGES)
        raise ValueError(f"at most {MAX_PAGES} pages can be chosen from, got {width}: use block_size >= {larger}")
    scoring, attending, scorers, attenders = decode_tiles(query.dtype, D, DV)
    capacity = min(-(-problem.most // block_size) + 2, width)
    blocks = -(-group // scoring.rows)
    score_splits = share(scorers, numbers * blocks, -(-width // scoring.keys))
    splits = share(attenders, numbers * blocks, -(-capacity * block_size // attending.keys))
    rows = numbers * group
    # What is left for the next kernels: floats but for the last three.
    scratch = {
        # Logits of pages, and the parts of their softmax.
        "page_logits": rows * width,
        "page_peak": rows * (score_splits + 1),
        "page_total": rows * (score_splits + 1),
        # The parts of the softmax of keys.
        "peak": rows * splits,
        "total": rows * splits,
        "acc": rows * splits * DV,
        # Of each query and group: pages that it attends, which rise, counted as by ``place_of_page``; how many, and the
        # offset of the first query head in results, so that those who attend need not keep it in registers; and for
        # ``split.arrives_last``.
        "pages": numbers * capacity,
        "count": numbers * 2,
        "arrivals": numbers * blocks,
    }
    # At most 16 pages a thread at a time.
    at_once = min(_CHOOSE_AT_ONCE, max(128, triton.next_power_of_2(width)))
    choosing = Tiles(1, at_once, max(4, at_once // 512), 1)
    joining = replace(attending, rows=min(attending.rows, triton.next_power_of_2(group)))
    architecture = launch.architecture_of(query.device)

    def options(tiles: Tiles, **more: Any) -> dict[str, Any]:
        return {**more, **launch.compile_options(tiles, architecture)}

    parts = score_splits + 1
    score = options(scoring, splits=score_splits, shape=launch.shape_of(D, D, scoring))
    of_pages = {"BLOCK_SIZE": block_size, "PAGES": keys_stored // block_size}
    choose = options(choosing, splits=parts, BLOCK_P=at_once, BLOCK_S=padded_splits(parts), **of_pages)
    shapes = {"shape": launch.shape_of(D, DV, attending), "join_shape": launch.shape_of(D, DV, joining)}
    kernels = (
        (score_pages_kernel, (numbers, parts + problem.new, blocks), score),
        (choose_pages_kernel, (numbers, 1, 1), choose),
        (attend_pages_kernel, (numbers, splits, blocks), options(attending, **shapes)),
    )
    arguments = {
        "width": width, "page": page_shape_of(D, block_size, keys_stored), "stored_pages": stored_pages,
        "capacity": capacity, "blocks": blocks,
    }  # fmt: skip
    return partial(_decode, Launches(problem, kernels, arguments, scratch))


def _decode(launches: Launches, kept: dict[int, Any], problem: Problem) -> AttentionResult:
    """Attention of a problem."""
    _, _, _, visible, origin, budget = problem[:6]
    table, attended, lse, lse_keys = problem.table, budget.new_empty(launches.rows), None, None
    if problem.stats:
        lse, lse_keys = (torch.empty_like(attended, dtype=torch.float32) for _ in range(2))
    arguments: dict[str, Any] = {"attended": attended, "lse": lse, "lse_keys": lse_keys}
    if table is None:
        arguments["inputs"], arguments["table"] = RowInputs(visible, budget, origin), None
        arguments["statistics"] = PageStatistics(*problem.key_index)
    else:
        arguments["inputs"], arguments["table"] = RowInputs(visible, budget), Table(table, table.stride(0))
        arguments["statistics"] = PageStatistics(*map(heads, problem.key_index))  # type: ignore[arg-type]
    output = launches(kept, problem, arguments)
    kept_mass = None if lse_keys is None else launch.kept_mass_of(problem, lse_keys)
    return AttentionResult(output, lse, kept_mass, attended)


def decode_tiles(dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[Tiles, Tiles, int, int]:
    """Tiles of pages scored and of keys attended, and how many programs of each a multiprocessor's registers hold."""
    scoring, widest = score_tiles(dtype, head_dim), max(launch.padded_dim(head_dim), launch.padded_dim(value_dim))
    if dtype == torch.float32:
        attending = Tiles(scoring.rows, 32, 8 if widest > 128 else 4, 1, 32)
        return scoring, attending, 8 // scoring.warps, 8 // attending.warps
    # Channels beyond the head_dim are masked, which takes registers.
    scorers = 3 if head_dim == launch.padded_dim(head_dim) <= 128 else 2
    keys, attenders = (32, 2) if widest > 128 else (64, 3)
    return scoring, Tiles(scoring.rows, keys, 4, 2), scorers, attenders
