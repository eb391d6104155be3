"""How a step of decoding by codes is divided among programs: tiles, splits, what is held between launches, options."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton

from nc_patch.ops.means import slot_count
from nc_patch.ops.problem import Problem
from nc_patch.ops.triton.launch import Tiles, compile_options, padded_dim, shape_of
from nc_patch.ops.triton.split import MAX_SPLITS, MOST_ARRIVALS, share
from nc_patch.ops.triton.structs import Shape, constants
from nc_patch.selections.topk.encode import key_shape

# Keys that a guess is taken from: fewer up to so many keys, and more beyond, where a closer guess saves more keys.
_SAMPLES, _FEW_KEYS, _MOST_SAMPLES = 4096, 1 << 18, 8192
# Fewer keys than this are divided like this many.
_SHORTEST = 4096
# Of the scores that reach a row's guess, up to 1.5 for each key of its budget, so many at most are held in registers.
_MOST_HELD, _HELD_BESIDES = 16384, 256
# The least that a matrix instruction takes: of 8-bit numbers to be summed, and of rows.
_LEAST_CHANNELS, _MATRIX_ROWS = 32, 16
# Pages of a tile, at most.
_PAGES = 32


class Plan(NamedTuple):
    """How a call is divided, from shapes and host integers alone.

    Attributes:
        keys: that it is made for. block_rows: rows of a block. tile: keys of a tile of codes.
        samples: keys that a guess is taken from, a multiple of ``tile``, shared by ``samplers`` programs.
        held: scores that a search holds.
        rows, blocks: of all heads and sequences. splits: programs that share a block of rows.
        slots: of the pages, or 0. parts: of a row's softmax, of the splits and of what besides shares its pages.
    """

    keys: int
    block_rows: int
    tile: int
    samples: int
    samplers: int
    held: int
    rows: int
    blocks: int
    splits: int
    slots: int
    parts: int

    @property
    def segment(self) -> int:
        """The keys of a split at most, all of which it has room to list: every ``splits``-th tile that holds any."""
        return -(-(-(-self.keys // self.tile) + 1) // self.splits) * self.tile


def plan_for(problem: Problem, keys: int, architecture: str) -> Plan:
    """The one place where splits and capacities are chosen, for so many keys.

    What kernels are compiled for follows from the next power of two, so that few steps of a generation take others.
    """
    (B, _, Lq, D), Hkv = problem.query.shape, problem.key.shape[1]
    largest, group_rows = max(problem.head_dims), problem.group * Lq
    budget = max(1, min(problem.most, keys))
    slim = _is_slim(problem)
    resident = 3 if slim else 1 if largest > 128 or problem.query.dtype == torch.float32 else 2
    block_rows = 8 if group_rows <= 8 else 16
    few = padded_dim(D) <= 128 and block_rows == 8
    tile = 128 if few else 32 if architecture.startswith("gfx") else 64
    blocks, planned = B * Hkv * -(-group_rows // block_rows), max(_SHORTEST, triton.next_power_of_2(keys))
    splits = share(resident, blocks, planned // tile, MAX_SPLITS)
    samples = _SAMPLES if keys <= _FEW_KEYS else _MOST_SAMPLES
    # Powers of two, so that few batches take other variants.
    samplers = min(samples // tile, triton.next_power_of_2(max(1, 132 // blocks)))
    held = min(_MOST_HELD, triton.next_power_of_2(min(planned, 8 * budget // 5 + _HELD_BESIDES)))
    slots = parts = 0
    if problem.means is not None:
        slots = slot_count(keys)
        # By their registers eight warps of those that go over pages fit a multiprocessor.
        parts = share(1 if largest > 128 else 2, B * Hkv * -(-group_rows // _MATRIX_ROWS), -(-slots // _PAGES))
    rows = B * Hkv * group_rows
    return Plan(keys, block_rows, tile, samples, samplers, held, rows, blocks, splits, slots, splits + parts)


def _is_slim(problem: Problem) -> bool:
    """Whether programs are held to so few registers that three fit a multiprocessor; masks of channels need more."""
    return problem.query.dtype != torch.float32 and max(problem.head_dims) in (64, 128) and not problem.bounds


def scratch_of(plan: Plan, problem: Problem) -> dict[str, int]:
    """What the kernels of a step leave for those after them, see ``Launches``: floats but where it says that it is int.

    Rows are those of ``[B, Hq, Lq]``; a block is of rows that share a list, of which each of the splits has a segment.
    An entry is a place in a block's list.
    """
    rows, blocks, bounds = plan.rows, plan.blocks, int(problem.bounds)
    splits, parts, entries = rows * plan.splits, rows * plan.parts, rows * plan.splits * plan.segment
    return {
        # Scores of sampled keys, and from these one that the needed keys of the row should reach.
        "samples": rows * plan.samples,
        "guess": rows,
        # Int: the listed keys, rising, and how many they are.
        "positions": blocks * plan.splits * plan.segment,
        "counts": blocks * plan.splits,
        # Exact scores of entries and, where bounds are wanted, what they may be off by.
        "scores": entries,
        "errors": entries * bounds,
        # Int: how many rivals the row has collected, at first and again; their positions (int) and scores.
        "reached": 2 * rows,
        "reached_positions": entries,
        "reached_scores": entries,
        # Float and int: the ``Limits`` of what the row attends.
        "threshold": rows,
        "ties_end": rows,
        # Int: how many keys of each page the row attends.
        "page_counts": rows * plan.slots,
        # Int, of blocks, see ``split.finish_part``; and the parts of each row's softmax.
        "arrivals": rows * MOST_ARRIVALS.value,
        "peak": parts,
        "total": parts,
        "acc": parts * problem.value.shape[3],
        # The three ``Masses`` of each split of each row, see ``scan.store_masses``.
        "masses": 3 * 3 * splits * bounds,
    }


def options_of(plan: Plan, problem: Problem, architecture: str) -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel, and the options of the compiler."""
    (D, DV), bounds, slim = problem.head_dims, problem.bounds, _is_slim(problem)
    amd, largest, is_float32 = architecture.startswith("gfx"), max(D, DV), problem.query.dtype == torch.float32
    channels = max(_LEAST_CHANNELS, padded_dim(D))
    codes = constants(Shape(D, DV, plan.block_rows, plan.tile, channels, padded_dim(DV), channels))
    # float32 multiplies on the plain floating point units, where a sum at once takes too many registers.
    chunk = 32 if is_float32 else None
    scored = Tiles(_MATRIX_ROWS, max(16, min(32, 4096 // padded_dim(D))), 4, 2, chunk)
    # With more at once the assemblers of other architectures spill registers; AMD's warps are twice as wide.
    many = slim and architecture == "sm_90"
    warps = 8 if (is_float32 or (largest > 128 and bounds)) and not amd else 4
    # Two tiles on their way: positions come first, and one tile of so few values would leave the memory idle.
    stages = 2 if amd else 3 if many else 4 if is_float32 else 5
    gathered = Tiles(_MATRIX_ROWS, _PAGES if many else 16, warps, stages, chunk)

    plain = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    # So many programs fit a multiprocessor as the plan counts on, and otherwise all registers are named.
    third = {} if amd else {"maxnreg": 168 if slim else 255}
    choosers = 16 if plan.held > 8192 else 8 if plan.held > 2048 else 4
    return {
        "prepare": {**plain, "shape": codes, "new_keys": key_shape(D, DV), "SAMPLES": plan.samples,
                    "SAMPLERS": plan.samplers},
        "guess": {**plain, "num_warps": 16 if plan.samples > 4096 else 8, "SAMPLES": plan.samples},
        "scan": {**plain, "num_warps": 8 if largest > 128 and not amd else 4, **third, "shape": codes,
                 "scored": shape_of(D, DV, scored), "BOUNDS": bounds,
                 "STAGES": 2 if amd or (bounds and plan.block_rows > 8) else 3},
        "choose": {**plain, **({} if amd else {"maxnreg": min(255, 2048 // choosers)}), "num_warps": choosers,
                   "BLOCK_E": plan.held},
        "gather": {**compile_options(gathered, architecture), **third, "shape": shape_of(D, DV, gathered),
                   "BOUNDS": bounds, "join_shape": shape_of(D, DV, replace(gathered, rows=plan.block_rows))},
    }  # fmt: skip
