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
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton import launch
from nc_patch.ops.triton.launch import Launches, Tiles
from nc_patch.ops.triton.split import padded_splits, share
from nc_patch.ops.triton.structs import Heads, RowInputs, Softmax, Table, constants
from nc_patch.selections.block.decode_kernels import (
    ChooseShape,
    Chosen,
    attend_pages_kernel,
    choose_pages_kernel,
    score_pages_kernel,
)
from nc_patch.selections.block.pages import PageStatistics, check_pages, check_table
from nc_patch.selections.block.summarize import page_shape_of, score_tiles
from nc_patch.selections.index import extend

# Counts of pages have 21 bits.
MAX_PAGES = 2**21 - 1
_CHOOSE_AT_ONCE = 4096
# Steps with as many of these runs of keys share a plan.
_KEYS = 1024


class Plan(NamedTuple):
    """What steps that are alike are launched with: all that follows from shapes, strides and dtypes.

    Attributes:
        dense: whether their tensors are taken as they are, and none is copied.
        rows, output: the shapes ``[B, Hq, Lq]`` and ``[B, Hq, Lq, Dv]``.
        strides: of query, key, value and, in blocks of memory, codes and scales, as in ``Heads``.
        sizes: 32-bit words of the parts of the scratch memory, multiples of 16 bytes: logits, peaks and totals of
            pages; peaks, totals and sums of attended keys; and integers, whose parts, of ``Chosen``, have ``counts``.
    """

    dense: bool
    rows: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    sizes: list[int]
    counts: list[int]
    launches: Launches


def bound_block_decode(problem: Problem) -> Callable[[Problem], AttentionResult]:
    """Attention of problems like this one over the pages that each query chooses; see ``Selection.bound``.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. No budget is larger
    than ``problem.most``. ``problem.new`` is 0, or 1 where there is one query. The kept mass costs as much as dense
    attention.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take, or more than ``MAX_PAGES`` pages.
    """
    length = problem.key.shape[-2]
    keys = length if problem.table is not None else -(-length // _KEYS)
    layout = launch.layout_of(problem, keys, -(-problem.most // problem.page_size))
    plans = _plans(_CHOOSE_AT_ONCE, *layout)
    if not plans:
        plans.append(_plan(problem))
    return partial(_decode, plans[0], {})


@lru_cache(maxsize=256)
def _plans(*layout: Any) -> list[Plan]:
    """Room for the plan of problems of a layout."""
    return []


def _decode(plan: Plan, kept: dict[int, dict[str, Any]], problem: Problem) -> AttentionResult:
    """Attention of a problem by its plan; ``kept`` are the arguments of ``_shared``, by stream."""
    if not plan.dense:
        # New keys first: the kernels would write to copies.
        problem = launch.prepared(extend(problem, "pages", "triton") if problem.new else problem)
        return bound_block_decode(problem)(problem)
    query, key, value, visible, origin, budget = problem[:6]
    attended, output, lse, lse_keys = budget.new_empty(plan.rows), query.new_empty(plan.output), None, None
    if problem.stats:
        lse, lse_keys = (torch.empty_like(attended, dtype=torch.float32) for _ in range(2))
    if not output.numel():
        return AttentionResult(output, lse, lse_keys, attended)
    stream = launch.stream_of(query.device)
    if stream not in kept:
        kept[stream] = _shared(plan, problem)
    strides = plan.strides
    changing = {
        "query": Heads(query, *strides[0]), "key": Heads(key, *strides[1]), "value": Heads(value, *strides[2]),
        "output": output, "attended": attended, **kept[stream],
    }  # fmt: skip
    if problem.table is None:
        changing["inputs"] = RowInputs(visible, budget, origin)
        changing["statistics"] = PageStatistics(*problem.key_index)
    else:
        changing["inputs"] = RowInputs(visible, budget)
        changing["table"] = Table(problem.table, problem.table.stride(0))
        statistics = (Heads(t, *at) for t, at in zip(problem.key_index, strides[3:], strict=True))
        changing["statistics"] = PageStatistics(*statistics)  # type: ignore[arg-type]
    if problem.sinks is not None:
        changing["sinks"] = problem.sinks
    if problem.stats:
        changing["lse"], changing["lse_keys"] = lse, lse_keys
    plan.launches(query.device, changing, stream)
    kept_mass = None if lse_keys is None else launch.kept_mass_of(problem, lse_keys)
    return AttentionResult(output, lse, kept_mass, attended)


def _shared(plan: Plan, problem: Problem) -> dict[str, Any]:
    """Arguments that one layer after another uses: memory for what the kernels leave each other; and Lk."""
    memory = torch.empty(sum(plan.sizes), dtype=torch.float32, device=problem.query.device)
    page_logits, page_peak, page_total, peak, total, acc, integers = memory.split_with_sizes(plan.sizes)
    pages, count, arrivals = integers.view(torch.int32).split_with_sizes(plan.counts)
    return {
        "page_logits": page_logits, "page_parts": Softmax(None, page_peak, page_total),
        "chosen": Chosen(pages, count, arrivals), "parts": Softmax(acc, peak, total), "Lk": problem.key_length,
    }  # fmt: skip


def _plan(given: Problem) -> Plan:
    """The plan of a problem, which it checks."""
    problem, table, block_size, Lk = given, given.table, given.page_size, given.key_length
    if table is None:
        problem = launch.prepared(given)
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
    rows, page_parts = numbers * group, numbers * group * (score_splits + 1)
    floats = (rows * width, page_parts, page_parts, rows * splits, rows * splits, rows * splits * DV)
    integers = (numbers * capacity, 2 * numbers, numbers * blocks)
    sizes, counts = ([-(-size // 4) * 4 for size in parts] for parts in (floats, integers))
    # At most 16 pages a thread at a time.
    at_once = min(_CHOOSE_AT_ONCE, max(128, triton.next_power_of_2(width)))
    choosing = Tiles(1, at_once, max(4, at_once // 512), 1)
    joining = replace(attending, rows=min(attending.rows, triton.next_power_of_2(group)))
    choice = ChooseShape(block_size, at_once, padded_splits(score_splits + 1), keys_stored // block_size)
    architecture = launch.architecture_of(query.device)
    placed = (query, key, value, *(() if table is None else problem.key_index))
    strides = tuple(t.stride()[:3] for t in placed)
    arguments = {
        "num_kv_heads": Hkv, "group": group, "Lq": Lq, "settings": launch.settings_of(problem), "width": width,
        "page": page_shape_of(D, block_size, keys_stored), "stored_pages": stored_pages, "capacity": capacity,
        "blocks": blocks, "budget_heads": problem.budget.shape[1], "table": None, "sinks": None, "lse": None,
        "lse_keys": None,
    }  # fmt: skip

    def options(tiles: Tiles, splits: int, **shapes: Any) -> dict[str, Any]:
        return {"splits": splits, **shapes, **launch.compile_options(tiles, architecture)}

    score = options(scoring, score_splits, shape=launch.shape_of(D, D, scoring))
    choose = options(choosing, score_splits + 1, shape=constants(choice))
    shapes = {"shape": launch.shape_of(D, DV, attending), "join_shape": launch.shape_of(D, DV, joining)}
    kernels = (
        (score_pages_kernel, (numbers, score_splits + 1 + problem.new, blocks), score),
        (choose_pages_kernel, (numbers, 1, 1), choose),
        (attend_pages_kernel, (numbers, splits, blocks), options(attending, splits, **shapes)),
    )
    dense = all(mine is theirs for mine, theirs in zip(given.tensors(), problem.tensors(), strict=True))
    row_shape, launches = tuple(query.shape[:3]), Launches(kernels, arguments)
    return Plan(dense, row_shape, (*row_shape, DV), strides, [*sizes, sum(counts)], counts, launches)


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
