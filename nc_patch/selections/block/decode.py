"""``block`` while decoding, in three launches; ``definition.page_mask`` defines what it computes.

1. Score: the statistics are read once for the query heads of a group: ``3 * D + 12`` bytes for each visible page and
   key/value head, and a float32 logit written for each query head. A new key is taken into the statistics.
2. Choose: one program for a query and group reads the logits once, writes the pages' weights over the first
   head's, and finds the cut by bisection, reading them back from the cache; it writes the list of pages.
3. Attend: the list is divided among programs, which gather ``2 * (D + Dv)`` bytes in 16 bits for each attended key.
   The last of a row joins what they leave: see ``split``.

One layer of Llama-3-8B (Hq 32, Hkv 8, D 128, bfloat16, batch 1), pages of 32, 4,705 keys, at 131,072 keys: statistics
13.0 MB, logits 0.5 MB written and read, K and V 19.3 MB, partial sums 1.1 MB written and read: 36 MB against 537 MB
for dense attention. Nothing is read back to the host and every size follows from shapes and host integers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton.launch import (
    Launches,
    Tiles,
    alignment,
    architecture_of,
    compile_options,
    compiled_kernels,
    kept_mass_of,
    padded_dim,
    prepared,
    settings_of,
    shape_of,
)
from nc_patch.ops.triton.split import padded_splits, share
from nc_patch.ops.triton.structs import Heads, RowInputs, Softmax, Table, constants
from nc_patch.selections.block.decode_kernels import (
    ChooseShape,
    Chosen,
    attend_pages_kernel,
    choose_pages_kernel,
    score_pages_kernel,
)
from nc_patch.selections.block.pages import PageStatistics, check_pages, check_table, page_count
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
        strides: of query, key, value and, in blocks of memory, codes and scales, as in ``Heads``.
        words: 32 bits each, of the scratch memory; none for no row.
        sizes: words of its parts, multiples of 16 bytes: logits, peaks and totals of pages; peaks, totals and sums of
            attended keys; and of one that holds integers, whose parts have ``counts``: see ``Chosen``.
        launches: the three kernels.
    """

    strides: tuple[tuple[int, ...], ...]
    words: int
    sizes: list[int]
    counts: list[int]
    launches: Launches


def triton_block_decode(problem: Problem) -> AttentionResult:
    """Attention of each query over the pages that it chooses by their statistics; no budget is larger than ``most``.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. ``problem.new`` is 0,
    or 1 where there is one query. The kept mass costs as much as dense attention.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take, or more than ``MAX_PAGES`` pages.
    """
    problem, plan = _planned(problem)
    return _decode(plan, problem)


def bound_block_decode(problem: Problem) -> Callable[[Problem], AttentionResult]:
    """``triton_block_decode`` of problems like this one; see ``Selection.bound``."""
    checked, plan = _planned(problem)
    taken = all(given is taken for given, taken in zip(problem.tensors(), checked.tensors(), strict=True))
    return partial(_decode, plan) if taken else triton_block_decode


def _decode(plan: Plan, problem: Problem) -> AttentionResult:
    query, key, value, visible, origin, budget, *_ = problem
    B, Hq, Lq, _ = query.shape
    attended, strides = budget.new_empty((B, Hq, Lq)), plan.strides
    output = query.new_empty((B, Hq, Lq, value.shape[3]))
    lse = lse_keys = None
    if problem.stats:
        lse, lse_keys = (torch.empty_like(attended, dtype=torch.float32) for _ in range(2))
    if not plan.words:
        return AttentionResult(output, lse, lse_keys, attended)
    scratch = torch.empty(plan.words, dtype=torch.float32, device=query.device)
    page_logits, page_peak, page_total, peak, total, acc, integers = scratch.split_with_sizes(plan.sizes)
    pages, count, arrivals = integers.view(torch.int32).split_with_sizes(plan.counts)
    statistics, table = PageStatistics(*problem.key_index), None
    inputs = RowInputs(visible, budget, origin)
    if problem.table is not None:
        statistics = PageStatistics(*(Heads(t, *at) for t, at in zip(statistics, strides[3:], strict=True)))  # type: ignore[arg-type]
        inputs, table = RowInputs(visible, budget), Table(problem.table, problem.table.stride(0))
    changing = {
        "query": Heads(query, *strides[0]), "key": Heads(key, *strides[1]), "value": Heads(value, *strides[2]),
        "inputs": inputs, "Lk": problem.key_length, "table": table, "statistics": statistics,
        "chosen": Chosen(pages, count, attended, arrivals), "page_logits": page_logits, "sinks": problem.sinks,
        "output": output, "lse": lse, "lse_keys": lse_keys, "page_parts": Softmax(None, page_peak, page_total),
        "parts": Softmax(acc, peak, total),
    }  # fmt: skip
    plan.launches(query.device, changing)
    kept_mass = None if lse_keys is None else kept_mass_of(problem, lse_keys)
    return AttentionResult(output, lse, kept_mass, attended)


@lru_cache(maxsize=256)
def _plans(*layout: Any) -> list[Plan]:
    """Room for the plan of problems of a layout, once one of them has been checked."""
    return []


def _planned(problem: Problem) -> tuple[Problem, Plan]:
    """The problem as the kernels take it, and its plan; what is alike is checked once."""
    query, key, value, *_ = problem
    others = (query, *problem[3:6], *problem.key_index, problem.sinks, problem.table)
    keys = -(-key.shape[-2] // _KEYS) if problem.table is None else key.shape[-2]
    plans = _plans(
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in others],
        *[(t.shape[:2], t.shape[3:], t.stride(), t.dtype, t.device) for t in (key, value)],
        *(key.shape[2:3] == value.shape[2:3], keys, -(-problem.most // problem.page_size)),
        *(problem.page_size, problem.new, problem.stats, problem.scale, problem.softcap),
        *(architecture_of(query.device), _CHOOSE_AT_ONCE),
        alignment(*problem.tensors(), problem.table),
    )
    if plans:
        return problem, plans[0]
    if problem.table is None:
        checked = prepared(problem)
        codes, scales = checked.key_index
        check_pages(checked.key, codes, scales, codes.shape[2] if codes.ndim == 5 else 0)
    else:
        checked = problem
        check_table(problem)
    plan = _plan(checked)
    if all(given is taken for given, taken in zip(problem.tensors(), checked.tensors(), strict=True)):
        plans.append(plan)
    elif problem.new:
        # The kernels would write to copies.
        return _planned(extend(problem, "pages", "triton"))
    return checked, plan


def _plan(problem: Problem) -> Plan:
    query, key, value, block_size = problem.query, problem.key, problem.value, problem.page_size
    B, _, Lq, D = query.shape
    Hkv, _, DV = value.shape[1:]
    group, numbers, Lk, table = problem.group, B * Lq * Hkv, problem.key_length, problem.table
    stored_pages = problem.key_index[0].shape[2] if table is None else page_count(Lk, block_size)
    # A query's pages: those that a run of at most Lk keys can touch.
    width = max(1, min(stored_pages, page_count(-(-Lk // _KEYS) * _KEYS, block_size) + 1))
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
    blocks_of = None if table is None else (table.stride(0), key.shape[2])
    pages_stored = 0 if table is None else key.shape[2] // block_size
    choice = ChooseShape(block_size, at_once, padded_splits(score_splits + 1), pages_stored)
    common = {"num_kv_heads": Hkv, "group": group, "Lq": Lq}
    page = page_shape_of(D, block_size, 0 if table is None else key.shape[2])
    scored = {**common, "settings": settings_of(problem), "page": page}
    score = {"stored_pages": stored_pages, "width": width, "splits": score_splits, "shape": shape_of(D, D, scoring)}
    choose = {"width": width, "splits": score_splits + 1, "capacity": capacity, "blocks": blocks}
    choose |= {"budget_heads": problem.budget.shape[1], "shape": constants(choice)}
    shapes = {"shape": shape_of(D, DV, attending), "join_shape": shape_of(D, DV, joining)}
    placed = (query, key, value) if table is None else (query, key, value, *problem.key_index)
    architecture, strides = architecture_of(query.device), tuple(t.stride()[:3] for t in placed)
    sinks = None if problem.sinks is None else problem.sinks.dtype
    alike = (architecture, query.device, query.dtype, sinks, not problem.softcap, problem.stats, blocks_of)
    scoring_options = {**scored, **score, **compile_options(scoring, architecture)}
    choosing_options = {**common, **choose, **compile_options(choosing, architecture)}
    attending_options = {**scored, **shapes, "splits": splits, "capacity": capacity}
    attending_options |= compile_options(attending, architecture)
    compiled = compiled_kernels(
        ("block", strides, D, DV, choice, joining.rows, *alike), alignment(*problem.tensors(), problem.table)
    )
    return Plan(
        strides,
        sum(sizes) + sum(counts),
        [*sizes, sum(counts)],
        counts,
        Launches(
            (
                (score_pages_kernel, (numbers, score_splits + 1 + problem.new, blocks), scoring_options),
                (choose_pages_kernel, (numbers, 1, 1), choosing_options),
                (attend_pages_kernel, (numbers, splits, blocks), attending_options),
            ),
            {},
            compiled,
        ),
    )


def decode_tiles(dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[Tiles, Tiles, int, int]:
    """Tiles of pages scored and of keys attended, and how many programs of each a multiprocessor's registers hold."""
    scoring, widest = score_tiles(dtype, head_dim), max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        attending = Tiles(scoring.rows, 32, 8 if widest > 128 else 4, 1, 32)
        return scoring, attending, 8 // scoring.warps, 8 // attending.warps
    # Channels beyond the head_dim are masked, which takes registers.
    scorers = 3 if head_dim == padded_dim(head_dim) <= 128 else 2
    keys, attenders = (32, 2) if widest > 128 else (64, 3)
    return scoring, Tiles(scoring.rows, keys, 4, 2), scorers, attenders
