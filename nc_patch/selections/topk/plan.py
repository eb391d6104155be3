"""How a step of decoding by codes is divided among programs: tiles, splits, room in lists, options of the compiler."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nc_patch.ops.means import slot_count
from nc_patch.ops.triton.launch import Tiles, compile_options, padded_dim, shape_of, tiles_for
from nc_patch.ops.triton.split import MAX_SPLITS, padded_splits, planned_length, share
from nc_patch.ops.triton.structs import constants
from nc_patch.selections.topk.scan import CodeShape

# Keys that a guess is taken from: fewer up to so many keys, and more beyond, where a closer guess saves more keys.
_SAMPLES, _FEW_KEYS, _MOST_SAMPLES = 4096, 1 << 18, 8192
# Room in a block's list, per key of the largest budget: for so many rows, each with twice its budget; and besides.
_LEAST_SHARES, _MOST_SHARES, _ROOM_BESIDES = 4, 8, 4096
# Room for what reaches a row's guess, per key of the largest budget; besides, the same.
_REACHED_PER_KEY = 3
# Room that a segment has beyond its even share of the list.
_SEGMENT_SLACK = 64
# Scores that a program of ``choose_kernel`` holds in registers.
_MOST_HELD = 16384
# Work is divided among programs as if this many keys, if not more, were chosen.
_FEWEST_CHOSEN = 1024
# Values of a tile: the least that a matrix instruction takes. More need more registers than three such programs have.
_GATHERED = 16
# The least that a matrix instruction takes: of 8-bit numbers to be summed, and of rows.
_LEAST_CHANNELS, _MATRIX_ROWS = 32, 16


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


@dataclass(frozen=True)
class Plan:
    """How a call is divided, from shapes and host integers alone.

    Attributes:
        rows, keys: shape of a tile of codes; ``rows`` make a block. splits: programs that share a block's codes.
        samples: keys that the guess is taken from, a multiple of ``keys``.
        segment: list entries that one split may fill. capacity: entries of a block's whole list.
        room: of these, how many may reach the guess of one row.
        scored, gathered: list entries of a tile of keys and of values.
        scorers, chunks: programs that share a block's list when it is scored, and when values are gathered.
        tail_parts: programs that share the pages of a tail; none without one.
        held: scores that choosing holds in registers.
    """

    rows: int
    keys: int
    splits: int
    samples: int
    segment: int
    capacity: int
    room: int
    scored: int
    gathered: int
    scorers: int
    chunks: int
    tail_parts: int
    held: int

    @property
    def parts(self) -> int:
        """Parts of a row's softmax that are joined in the end, at most ``MAX_SPLITS``."""
        return self.chunks + self.tail_parts

    def scratch_bytes(self, sizes: Sizes, want_bounds: bool) -> int:
        """What ``decode.Scratch`` allocates."""
        of_block = self.splits * (self.segment + 1) + self.capacity
        of_row = self.samples + 2 * self.room + max(self.capacity, sizes.keys) * (1 + want_bounds) + 8
        of_row += self.parts * (sizes.value_dim + 2) + (slot_count(sizes.keys) if self.tail_parts else 0)
        if want_bounds:
            of_row += 4 * self.splits + 8 * self.chunks
        return 4 * (sizes.blocks(self.rows) * of_block + sizes.rows * of_row)


def _shares(units: int, size: int) -> int:
    """``units`` divided by ``size``, rounded up; a call of Triton's takes longer than all of a plan."""
    return -(-units // size)


def _resident(dtype: torch.dtype, head_dim: int, want_bounds: bool) -> tuple[int, int, int]:
    """How many programs that scan, score and gather a multiprocessor holds at once, by their registers.

    ``head_dim`` is the larger one of keys and values; see ``launch_options``.
    """
    if _is_slim(dtype, head_dim, want_bounds):
        return 3, 4, 3
    return 1 if head_dim > 128 else 2, 3, 1 if dtype == torch.float32 else 2


def _is_slim(dtype: torch.dtype, head_dim: int, want_bounds: bool) -> bool:
    """Whether programs are held to so few registers that three or four fit a multiprocessor."""
    return dtype != torch.float32 and head_dim <= 128 and not want_bounds


def plan_for(
    sizes: Sizes,
    budget: int,
    dtype: torch.dtype = torch.bfloat16,
    architecture: str = "sm_90",
    *,
    want_bounds: bool = False,
    has_tail: bool = False,
) -> Plan:
    """The one place where tiles, splits and capacities are chosen; ``budget`` is the largest.

    The parts of a tail come first: the attended keys share what is left of ``MAX_SPLITS``. What kernels are compiled
    for follows from the ``planned_length``, so that few steps of a generation take others.
    """
    scanning, scoring, gathering = _resident(dtype, max(sizes.head_dim, sizes.value_dim), want_bounds)
    tail_parts = tail_splits(sizes, dtype, architecture) if has_tail else 0
    head_dim, keys, group_rows = padded_dim(sizes.head_dim), sizes.keys, sizes.group * sizes.queries
    rows = 8 if group_rows <= 8 else 16
    tile = 128 if head_dim <= 128 and rows == 8 else 32 if architecture.startswith("gfx") else 64
    blocks = sizes.blocks(rows)
    planned = planned_length(keys)
    splits = share(scanning, blocks, planned // tile, MAX_SPLITS)
    shares = min(_MOST_SHARES, max(_LEAST_SHARES, group_rows))
    capacity = max(1, min(keys, 2 * shares * budget + _ROOM_BESIDES))
    whole = _shares(_shares(keys, tile) + 1, splits) * tile
    scored = max(16, min(32, 4096 // head_dim))
    likely = min(planned, 2 * max(_FEWEST_CHOSEN, _power_of_2(budget)) * min(group_rows, rows))
    reached = _REACHED_PER_KEY * budget + _ROOM_BESIDES
    return Plan(
        rows=rows,
        keys=tile,
        splits=splits,
        samples=_SAMPLES if keys <= _FEW_KEYS else _MOST_SAMPLES,
        segment=whole if capacity >= keys else min(whole, 2 * _shares(capacity, splits) + _SEGMENT_SLACK),
        capacity=capacity,
        room=max(1, min(keys, reached)),
        scored=scored,
        gathered=_GATHERED,
        scorers=share(scoring, blocks, _shares(likely, scored), MAX_SPLITS),
        chunks=share(gathering, blocks, _shares(likely, _GATHERED), MAX_SPLITS - tail_parts),
        tail_parts=tail_parts,
        held=min(_MOST_HELD, _power_of_2(min(planned, reached))),
    )


def _power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def tail_tiles(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> Tiles:
    """Tiles of ``tail_kernel``: rows, and pages at once."""
    return tiles_for(architecture, dtype, head_dim, value_dim, 1)


def tail_splits(sizes: Sizes, dtype: torch.dtype, architecture: str) -> int:
    """How many programs share the pages of a block of rows: by their registers eight warps fit a multiprocessor."""
    tiles = tail_tiles(architecture, dtype, sizes.head_dim, sizes.value_dim)
    return share(8 // tiles.warps, sizes.blocks(tiles.rows), _shares(slot_count(sizes.keys), tiles.keys))


def launch_options(
    plan: Plan, sizes: Sizes, dtype: torch.dtype, architecture: str, want_bounds: bool
) -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel, and the options of the compiler."""
    tiles = (plan.rows, plan.keys, plan.samples, plan.scored, plan.gathered, plan.held)
    splits = (padded_splits(plan.splits), padded_splits(plan.chunks))
    pages = tail_tiles(architecture, dtype, *sizes[-2:]) if plan.tail_parts else None
    return _launch_options(tiles, splits, pages, dtype, *sizes[-2:], architecture, want_bounds)


@functools.lru_cache(maxsize=64)
def _launch_options(
    tiles: tuple[int, ...],
    splits: tuple[int, int],
    pages: Tiles | None,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    architecture: str,
    want_bounds: bool,
) -> dict[str, dict[str, Any]]:
    rows, keys, samples, scored, gathered, held = tiles
    amd, largest = architecture.startswith("gfx"), max(head_dim, value_dim)
    codes = constants(CodeShape(head_dim, rows, keys, max(_LEAST_CHANNELS, padded_dim(head_dim) // 2)))
    # float32 multiplies on the plain floating point units, where a sum at once takes too many registers.
    exact = Tiles(_MATRIX_ROWS, scored, 4, 2, 32 if dtype == torch.float32 else None)
    # AMD's warps are twice as wide, and eight leave too few registers.
    values = Tiles(_MATRIX_ROWS, gathered, 4 if amd or dtype != torch.float32 else 8, 2 if amd else 5)

    def of_tiles(tiles: Tiles) -> dict[str, Any]:
        return {**compile_options(tiles, architecture), "shape": shape_of(head_dim, value_dim, tiles)}

    plain = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    slim = _is_slim(dtype, largest, want_bounds)
    # So many programs fit a multiprocessor as the plan counts on, and otherwise all registers are named.
    fourth, third = ({} if amd else {"maxnreg": count if slim else 255} for count in (128, 168))
    scoring = {**of_tiles(exact), **fourth}
    choosing = {**plain, "num_warps": 16 if held > 8192 else 8 if held > 2048 else 4, "BLOCK_E": held}
    guessing = {**plain, "num_warps": 16 if samples > 4096 else 8 if samples >= 2048 else 4, "SAMPLES": samples}
    return {
        "sample": {**plain, "shape": codes, "SAMPLES": samples},
        "guess": guessing,
        "scan": {
            **plain, "num_stages": 3, "num_warps": 8 if largest > 128 and not amd else 4, **third, "shape": codes,
        },
        "score": {**scoring, "BLOCK_S": splits[0]},
        "choose": {**choosing, "ROWS": rows, "BLOCK_S": splits[0]},
        # Two tiles on their way: positions come first, and one tile of so few values would leave the memory idle.
        "gather": {**of_tiles(values), **third, "FLAGGED": False},
        "score_flagged": scoring,
        "choose_flagged": choosing,
        # There no positions come first, and more stages would spill registers.
        "gather_flagged": {**of_tiles(values), "num_stages": 2, "FLAGGED": True},
        # Two tiles of keys and of values on their way would leave AMD's shared memory room for one program.
        "tail": {} if pages is None else {**of_tiles(pages), **({"num_stages": 1} if amd else {})},
        "bounds": {**plain, "BLOCK_S": splits[0], "BLOCK_C": splits[1]},
    }  # fmt: skip
