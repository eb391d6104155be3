"""How a step of decoding by codes is divided among programs: tiles, splits, what is held between launches, options."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nc_patch.ops.means import slot_count
from nc_patch.ops.triton.launch import Tiles, compile_options, padded_dim, shape_of, tiles_for
from nc_patch.ops.triton.split import MAX_SPLITS, PARTS_AT_ONCE, padded_splits, planned_length, share
from nc_patch.ops.triton.structs import constants
from nc_patch.selections.topk.encode import key_shape
from nc_patch.selections.topk.scan import CodeShape

# Keys that a guess is taken from: fewer up to so many keys, and more beyond, where a closer guess saves more keys.
_SAMPLES, _FEW_KEYS, _MOST_SAMPLES = 4096, 1 << 18, 8192
# Room in a block's list, per key of the largest budget: for so many rows, each with twice its budget; and besides.
_LEAST_SHARES, _MOST_SHARES, _ROOM_BESIDES = 4, 8, 4096
# Room that a segment has beyond its even share of the list.
_SEGMENT_SLACK = 64
# Of the scores that reach a row's guess, up to 1.5 for each key of its budget, so many at most are held in registers.
_MOST_HELD, _HELD_BESIDES = 16384, 256
# Values, and pages, of a tile; and where so many would take too many registers, the least for a matrix instruction.
_GATHERED, _FEW_GATHERED = 32, 16
# The least that a matrix instruction takes: of 8-bit numbers to be summed, and of rows.
_LEAST_CHANNELS, _MATRIX_ROWS = 32, 16
# Parts of the scratch memory begin at multiples of so many numbers.
_ALIGNED = 32


class Sizes(NamedTuple):
    """The shape of a call: ``B``, ``Hkv``, ``Hq / Hkv``, ``Lq``, ``Lk``, ``D`` and ``Dv``."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int

    @property
    def rows(self) -> int:
        """Rows of all heads and sequences: of a contiguous ``[B, Hq, Lq]``."""
        return self.batch * self.kv_heads * self.group * self.queries

    def blocks(self, rows: int) -> int:
        """Blocks of at most so many rows of one key/value head, of all heads and sequences."""
        return _shares(self.group * self.queries, rows) * self.batch * self.kv_heads


class Scratch(NamedTuple):
    """What the kernels of a step hand on to each other: where each part begins in ``memory``, float32 or int32 numbers.

    Rows are those of ``[B, Hq, Lq]``; a block is of rows that share a list, of which each of the splits has a segment.
    An entry is a place in a block's list, or a position where the block takes all keys; ``stride`` is how many a row
    has room for.

    Attributes:
        samples: float ``[rows, samples]``. guess: float ``[rows]``, a score that the needed keys should reach.
        positions: int ``[blocks, splits, segment]``, the listed keys, rising. counts: int ``[blocks, splits]``, how
            many they are; more than ``segment`` where there was no room.
        sure: int ``[rows, splits]``, how many keys certainly reach the guess. whole: int ``[blocks]``, 1 where the list
            is no proof and the block takes all keys.
        scores, errors: float ``[rows, stride]``, exact scores of entries and, where bounds are wanted, what they may be
            off by.
        reached: int ``[rows]``, how many rivals reach the guess; their positions and scores are ``[rows, stride]``.
        threshold, ties_end: float and int ``[rows]``, the ``Limits`` of what a row attends.
        page_counts: int ``[rows, slots]``, how many keys of each page a row attends.
        arrivals: int ``[rows, groups + 1]``, see ``split.finish_part``; a block uses those of the row of its number.
        peak, total, acc: float ``[rows, parts]`` and ``[rows, parts, Dv]``, parts of each row's softmax.
        outside: float ``[rows, splits, 4]``, the ``Mass`` of the lower and the upper logits of keys not listed.
        kept: float ``[rows, splits, 8]``, the same of the keys attended, and of the other entries.
    """

    memory: Any
    samples: Any
    guess: Any
    positions: Any
    counts: Any
    sure: Any
    whole: Any
    scores: Any
    errors: Any
    reached: Any
    reached_positions: Any
    reached_scores: Any
    threshold: Any
    ties_end: Any
    page_counts: Any
    arrivals: Any
    peak: Any
    total: Any
    acc: Any
    outside: Any
    kept: Any


class Plan(NamedTuple):
    """How a call is divided, from shapes and host integers alone.

    Attributes:
        rows, keys: shape of a tile of codes; ``rows`` make a block. splits: programs that share a block.
        samples: keys that the guess is taken from, a multiple of ``keys``.
        segment: list entries of a split. stride: entries that a row has room for.
        tail_parts: programs that share the pages of a tail; none without one. slots: of its pages.
        offsets: of the parts of ``Scratch``. numbers: how many it holds.
        constants: what the kernels are compiled for. options: those, and the compiler's, of each kernel.
    """

    rows: int
    keys: int
    splits: int
    samples: int
    segment: int
    stride: int
    tail_parts: int
    slots: int
    offsets: tuple[int, ...]
    numbers: int
    constants: tuple[Any, ...]
    options: dict[str, dict[str, Any]]

    @property
    def parts(self) -> int:
        """Parts of a row's softmax that are joined in the end."""
        return self.splits + self.tail_parts

    @property
    def groups(self) -> int:
        """Counters of ``split.finish_part``."""
        return _shares(self.parts, PARTS_AT_ONCE) + 1


def _shares(units: int, size: int) -> int:
    """``units`` divided by ``size``, rounded up; a call of Triton's takes longer than all of a plan."""
    return -(-units // size)


def _is_slim(dtype: torch.dtype, head_dim: int, want_bounds: bool) -> bool:
    """Whether programs are held to so few registers that three fit a multiprocessor; masks of channels need more."""
    return dtype != torch.float32 and head_dim in (64, 128) and not want_bounds


@functools.lru_cache(maxsize=64)
def plan_for(
    sizes: Sizes,
    budget: int,
    dtype: torch.dtype = torch.bfloat16,
    architecture: str = "sm_90",
    want_bounds: bool = False,
    has_tail: bool = False,
) -> Plan:
    """The one place where tiles, splits and capacities are chosen; ``budget`` is the largest.

    What kernels are compiled for follows from the ``planned_length``, so that few steps of a generation take others.
    """
    largest = max(sizes.head_dim, sizes.value_dim)
    resident = 3 if _is_slim(dtype, largest, want_bounds) else 1 if largest > 128 or dtype == torch.float32 else 2
    head_dim, keys, group_rows = padded_dim(sizes.head_dim), sizes.keys, sizes.group * sizes.queries
    rows = 8 if group_rows <= 8 else 16
    tile = 128 if head_dim <= 128 and rows == 8 else 32 if architecture.startswith("gfx") else 64
    blocks, planned = sizes.blocks(rows), planned_length(keys)
    splits = share(resident, blocks, planned // tile, MAX_SPLITS)
    tail_parts = tail_splits(sizes, dtype, architecture) if has_tail else 0
    capacity = min(keys, 2 * min(_MOST_SHARES, max(_LEAST_SHARES, group_rows)) * budget + _ROOM_BESIDES)
    whole = _shares(_shares(keys, tile) + 1, splits) * tile
    segment = whole if capacity >= keys else min(whole, 2 * _shares(capacity, splits) + _SEGMENT_SLACK)
    samples = _SAMPLES if keys <= _FEW_KEYS else _MOST_SAMPLES
    held = min(_MOST_HELD, _power_of_2(min(planned, 8 * budget // 5 + _HELD_BESIDES)))
    # A power of two, so that few batches take other variants.
    samplers = min(samples // tile, _power_of_2(max(1, 132 // blocks)))
    tiles = (rows, tile, samples, samplers, max(16, min(32, 4096 // head_dim)), held, padded_splits(splits))
    pages = tail_tiles(architecture, dtype, *sizes[-2:]) if has_tail else None
    compiled_for = (tiles, pages, dtype, *sizes[-2:], architecture, want_bounds)
    plan = Plan(
        rows, tile, splits, samples, segment, max(splits * segment, keys), tail_parts,
        slot_count(keys) if has_tail else 0, (), 0, compiled_for, _options(*compiled_for),
    )  # fmt: skip
    return with_scratch(plan, sizes, want_bounds)


def with_scratch(plan: Plan, sizes: Sizes, want_bounds: bool) -> Plan:
    """The plan with the places of the parts of ``Scratch``."""
    rows, blocks, parts = sizes.rows, sizes.blocks(plan.rows), plan.parts
    segments, stride = blocks * plan.splits, rows * plan.stride
    bounds = rows * plan.splits if want_bounds else 0
    lengths = (
        rows * plan.samples, rows, segments * plan.segment, segments, rows * plan.splits, blocks, stride,
        stride if want_bounds else 0, rows, stride, stride, rows, rows, rows * plan.slots,
        rows * plan.groups, rows * parts, rows * parts, rows * parts * sizes.value_dim,
        4 * bounds, 8 * bounds,
    )  # fmt: skip
    offsets, end = [], 0
    for length in lengths:
        offsets.append(end)
        end += _shares(length, _ALIGNED) * _ALIGNED
    return plan._replace(offsets=tuple(offsets), numbers=end)


def _power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def tail_tiles(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> Tiles:
    """Tiles of pages: rows, and pages at once."""
    return tiles_for(architecture, dtype, head_dim, value_dim, 1)


def tail_splits(sizes: Sizes, dtype: torch.dtype, architecture: str) -> int:
    """How many programs share the pages of a block of rows: by their registers eight warps fit a multiprocessor."""
    tiles = tail_tiles(architecture, dtype, sizes.head_dim, sizes.value_dim)
    return share(8 // tiles.warps, sizes.blocks(tiles.rows), _shares(slot_count(sizes.keys), tiles.keys))


@functools.lru_cache(maxsize=64)
def _options(
    tiles: tuple[int, ...],
    pages: Tiles | None,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    architecture: str,
    want_bounds: bool,
) -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel, and the options of the compiler."""
    rows, keys, samples, samplers, scored, held, splits = tiles
    amd, largest = architecture.startswith("gfx"), max(head_dim, value_dim)
    codes = constants(CodeShape(head_dim, rows, keys, max(_LEAST_CHANNELS, padded_dim(head_dim)), 2 if amd else 3))
    # float32 multiplies on the plain floating point units, where a sum at once takes too many registers.
    exact = Tiles(_MATRIX_ROWS, scored, 4, 2, 32 if dtype == torch.float32 else None)
    # AMD's warps are twice as wide, and eight leave too few registers.
    slim = _is_slim(dtype, largest, want_bounds)
    # With more at once the assemblers of other architectures spill registers.
    many = slim and architecture == "sm_90"
    gathered = _GATHERED if many else _FEW_GATHERED
    wide = dtype == torch.float32 or (largest > 128 and want_bounds)
    # Two tiles on their way: positions come first, and one tile of so few values would leave the memory idle.
    stages = 2 if amd else 3 if many else 4 if dtype == torch.float32 else 5
    values = Tiles(_MATRIX_ROWS, gathered, 8 if wide and not amd else 4, stages)

    def of_tiles(tiles: Tiles) -> dict[str, Any]:
        return {**compile_options(tiles, architecture), "shape": shape_of(head_dim, value_dim, tiles)}

    plain = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    # So many programs fit a multiprocessor as the plan counts on, and otherwise all registers are named.
    third = {} if amd else {"maxnreg": 168 if slim else 255}
    tail = None if pages is None else shape_of(head_dim, value_dim, replace(pages, keys=gathered))
    joining = shape_of(head_dim, value_dim, replace(values, rows=rows))
    choosers = 16 if held > 8192 else 8 if held > 2048 else 4
    choosing = {} if amd else {"maxnreg": min(255, 2048 // choosers)}
    return {
        "prepare": {**plain, "shape": codes, "new_keys": constants(key_shape(head_dim)), "SAMPLES": samples,
                    "SAMPLERS": samplers, "DV": value_dim, "BLOCK_DV": padded_dim(value_dim)},
        "guess": {**plain, "num_warps": 16 if samples > 4096 else 8, "SAMPLES": samples},
        "scan": {**plain, "num_warps": 8 if largest > 128 and not amd else 4, **third, "shape": codes,
                 "BOUNDS": want_bounds},
        "score": {**of_tiles(exact), **third, "ROWS": rows, "BLOCK_S": splits, "BOUNDS": want_bounds},
        "choose": {**plain, **choosing, "num_warps": choosers, "BLOCK_E": held, "ROWS": rows},
        "gather": {**of_tiles(values), **third, "pages": tail, "join_shape": joining, "BLOCK_S": splits,
                   "BOUNDS": want_bounds},
    }  # fmt: skip
