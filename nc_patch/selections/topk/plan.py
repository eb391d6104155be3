"""How a step of decoding by codes is divided among programs: tiles, splits, what is held between launches, options."""

from collections import namedtuple
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton

from nc_patch.ops.means import slot_count
from nc_patch.ops.triton.launch import Tiles, compile_options, padded_dim, shape_of
from nc_patch.ops.triton.split import MAX_SPLITS, MOST_ARRIVALS, padded_splits, share
from nc_patch.ops.triton.structs import constants
from nc_patch.selections.topk.encode import CodeShape, key_shape

# Keys that a guess is taken from: fewer up to so many keys, and more beyond, where a closer guess saves more keys.
_SAMPLES, _FEW_KEYS, _MOST_SAMPLES = 4096, 1 << 18, 8192
# Fewer keys than this are divided like this many.
_SHORTEST = 4096
# Room in a block's list, per key of the largest budget: for so many rows, each with twice its budget; and besides.
_LEAST_SHARES, _MOST_SHARES, _ROOM_BESIDES = 4, 8, 4096
# Room that a segment has beyond its even share of the list.
_SEGMENT_SLACK = 64
# Of the scores that reach a row's guess, up to 1.5 for each key of its budget, so many at most are held in registers.
_MOST_HELD, _HELD_BESIDES = 16384, 256
# The least that a matrix instruction takes: of 8-bit numbers to be summed, and of rows.
_LEAST_CHANNELS, _MATRIX_ROWS = 32, 16
# Pages of a tile, at most.
_PAGES = 32
# Parts of the scratch memory begin at multiples of so many numbers.
_ALIGNED = 32
# Where each part begins in a ``memory`` of float32 or int32 numbers; see ``with_scratch``.
Scratch = namedtuple(
    "Scratch",
    "memory samples guess positions counts sure whole scores errors reached reached_positions reached_scores threshold "
    "ties_end page_counts arrivals peak total acc outside kept",
)


class Sizes(NamedTuple):
    """The shape of a call: ``B``, ``Hkv``, ``Hq / Hkv``, ``Lq``, ``Lk``, ``D`` and ``Dv``."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int


class Variant(NamedTuple):
    """What the kernels are compiled for, beside the tensors.

    Attributes:
        rows: of a block. keys: of a tile of codes. samples: keys that a guess is taken from, a multiple of ``keys``,
            shared by ``samplers`` programs. held: scores that a search holds. splits: a power of two, no less.
    """

    rows: int
    keys: int
    samples: int
    samplers: int
    held: int
    splits: int
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    architecture: str
    bounds: bool


class Plan(NamedTuple):
    """How a call is divided, from shapes and host integers alone.

    Attributes:
        variant: what its kernels are compiled for. rows, blocks: of all heads and sequences.
        splits: programs that share a block of rows.
        segment: list entries of a split. stride: entries that a row has room for. slots: of its pages, or 0.
        parts: of a row's softmax, of the splits and of what besides shares its pages.
        offsets: of the parts of ``Scratch``. numbers: how many it holds.
    """

    variant: Variant
    rows: int
    blocks: int
    splits: int
    segment: int
    stride: int
    slots: int
    parts: int
    offsets: tuple[int, ...] = ()
    numbers: int = 0


def plan_for(
    sizes: Sizes, budget: int, dtype: torch.dtype, architecture: str, want_bounds: bool, has_tail: bool
) -> Plan:
    """The one place where splits and capacities are chosen; ``budget`` is the largest.

    What kernels are compiled for follows from the next power of two, so that few steps of a generation take others.
    """
    largest, keys, group_rows = max(sizes[-2:]), sizes.keys, sizes.group * sizes.queries
    slim = _is_slim(dtype, largest, want_bounds)
    resident = 3 if slim else 1 if largest > 128 or dtype == torch.float32 else 2
    rows = 8 if group_rows <= 8 else 16
    few = padded_dim(sizes.head_dim) <= 128 and rows == 8
    tile = 128 if few else 32 if architecture.startswith("gfx") else 64
    of_rows = lambda rows: -(-group_rows // rows) * sizes.batch * sizes.kv_heads  # noqa: E731
    blocks, planned = of_rows(rows), max(_SHORTEST, triton.next_power_of_2(keys))
    splits = share(resident, blocks, planned // tile, MAX_SPLITS)
    capacity = min(keys, 2 * min(_MOST_SHARES, max(_LEAST_SHARES, group_rows)) * budget + _ROOM_BESIDES)
    whole = -(-(-(-keys // tile) + 1) // splits) * tile
    segment = whole if capacity >= keys else min(whole, 2 * -(-capacity // splits) + _SEGMENT_SLACK)
    samples = _SAMPLES if keys <= _FEW_KEYS else _MOST_SAMPLES
    # Powers of two, so that few batches take other variants.
    samplers = min(samples // tile, triton.next_power_of_2(max(1, 132 // blocks)))
    held = min(_MOST_HELD, triton.next_power_of_2(min(planned, 8 * budget // 5 + _HELD_BESIDES)))
    variant = Variant(
        *(rows, tile, samples, samplers, held, padded_splits(splits)), dtype, *sizes[-2:], architecture, want_bounds
    )
    slots = slot_count(keys) if has_tail else 0
    # By their registers eight warps of those that go over pages fit a multiprocessor.
    tail = share(1 if largest > 128 else 2, of_rows(_MATRIX_ROWS), -(-slots // _PAGES)) if has_tail else 0
    all_rows, stride = group_rows * sizes.batch * sizes.kv_heads, max(splits * segment, keys)
    return with_scratch(Plan(variant, all_rows, blocks, splits, segment, stride, slots, splits + tail))


def _is_slim(dtype: torch.dtype, head_dim: int, want_bounds: bool) -> bool:
    """Whether programs are held to so few registers that three fit a multiprocessor; masks of channels need more."""
    return dtype != torch.float32 and head_dim in (64, 128) and not want_bounds


def with_scratch(plan: Plan) -> Plan:
    """The plan with the places of what the kernels of a step hand on to each other.

    Rows are those of ``[B, Hq, Lq]``; a block is of rows that share a list, of which each of the splits has a segment.
    An entry is a place in a block's list, or a position where the block takes all keys.
    """
    rows, blocks, bounds = plan.rows, plan.blocks, int(plan.variant.bounds)
    splits, parts, entries = rows * plan.splits, rows * plan.parts, rows * plan.stride
    lengths = {
        # Scores of sampled keys, and from these one that the needed keys of the row should reach.
        "samples": rows * plan.variant.samples,
        "guess": rows,
        # Int: the listed keys, rising, and how many they are; more than ``segment`` where there was no room.
        "positions": blocks * plan.splits * plan.segment,
        "counts": blocks * plan.splits,
        # Int: how many rivals in the split certainly reach the row's guess.
        "sure": splits,
        # Int: 1 where the list is no proof and the block takes all keys.
        "whole": blocks,
        # Exact scores of entries and, where bounds are wanted, what they may be off by.
        "scores": entries,
        "errors": entries * bounds,
        # Int: how many rivals the row has collected; their positions (int) and scores.
        "reached": rows,
        "reached_positions": entries,
        "reached_scores": entries,
        # Float and int: what the row's collection reaches at least, and then the ``Limits`` of what it attends.
        "threshold": rows,
        "ties_end": rows,
        # Int: how many keys of each page the row attends.
        "page_counts": rows * plan.slots,
        # Int, of blocks, see ``split.finish_part``; and the parts of each row's softmax.
        "arrivals": rows * MOST_ARRIVALS.value,
        "peak": parts,
        "total": parts,
        "acc": parts * plan.variant.value_dim,
        # ``Mass`` of the lower and the upper logits of keys not listed; of the keys attended and of the other entries.
        "outside": 4 * splits * bounds,
        "kept": 8 * splits * bounds,
    }
    *offsets, numbers = accumulate(
        (-(-lengths[name] // _ALIGNED) * _ALIGNED for name in Scratch._fields[1:]), initial=0
    )
    return plan._replace(offsets=tuple(offsets), numbers=numbers)


def options_of(variant: Variant) -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel, and the options of the compiler."""
    rows, keys, samples, samplers, held, splits, dtype, head_dim, value_dim, architecture, bounds = variant
    amd, largest, is_float32 = architecture.startswith("gfx"), max(head_dim, value_dim), dtype == torch.float32
    slim = _is_slim(dtype, largest, bounds)
    codes = constants(CodeShape(head_dim, rows, keys, max(_LEAST_CHANNELS, padded_dim(head_dim)), 2 if amd else 3))
    # float32 multiplies on the plain floating point units, where a sum at once takes too many registers.
    chunk = 32 if is_float32 else None
    scored = Tiles(_MATRIX_ROWS, max(16, min(32, 4096 // padded_dim(head_dim))), 4, 2, chunk)
    # With more at once the assemblers of other architectures spill registers; AMD's warps are twice as wide.
    many = slim and architecture == "sm_90"
    warps = 8 if (is_float32 or (largest > 128 and bounds)) and not amd else 4
    # Two tiles on their way: positions come first, and one tile of so few values would leave the memory idle.
    stages = 2 if amd else 3 if many else 4 if is_float32 else 5
    gathered = Tiles(_MATRIX_ROWS, _PAGES if many else 16, warps, stages, chunk)

    def of_tiles(tiles: Tiles) -> dict[str, Any]:
        return {**compile_options(tiles, architecture), "shape": shape_of(head_dim, value_dim, tiles)}

    plain = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    # So many programs fit a multiprocessor as the plan counts on, and otherwise all registers are named.
    third = {} if amd else {"maxnreg": 168 if slim else 255}
    choosers = 16 if held > 8192 else 8 if held > 2048 else 4
    return {
        "prepare": {**plain, "shape": codes, "new_keys": constants(key_shape(head_dim)), "SAMPLES": samples,
                    "SAMPLERS": samplers, "DV": value_dim, "BLOCK_DV": padded_dim(value_dim)},
        "guess": {**plain, "num_warps": 16 if samples > 4096 else 8, "SAMPLES": samples},
        "scan": {**plain, "num_warps": 8 if largest > 128 and not amd else 4, **third, "shape": codes,
                 "BOUNDS": bounds},
        "score": {**of_tiles(scored), **third, "ROWS": rows, "BLOCK_S": splits, "BOUNDS": bounds},
        "choose": {**plain, **({} if amd else {"maxnreg": min(255, 2048 // choosers)}), "num_warps": choosers,
                   "BLOCK_E": held},
        "gather": {**of_tiles(gathered), **third, "BLOCK_S": splits, "BOUNDS": bounds,
                   "join_shape": shape_of(head_dim, value_dim, replace(gathered, rows=rows))},
    }  # fmt: skip
