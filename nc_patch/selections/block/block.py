"""``Block``: key blocks that a block of queries chooses together; while decoding, pages that each query chooses."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nc_patch.common import check_choice, check_integer, check_number
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.reference import final_scores
from nc_patch.selections.base import Choice, Selection, register
from nc_patch.selections.block import layout  # noqa: F401  registers it
from nc_patch.selections.block.blocks import BLOCK_SIZES, BlockSettings, Mark, no_mark
from nc_patch.selections.block.definition import block_choice, chosen_mask, page_mask
from nc_patch.selections.block.torch import ChosenBlocks, torch_block_attention
from nc_patch.selections.block.torch_decode import torch_block_decode

QUERY_BLOCK_SIZES = (64, 128)
SAMPLE_STRIDES = (4, 8, 16, 32, 64)


@register("block")
@dataclass(frozen=True)
class Block(Selection):
    """Blocks of keys: in prefill those on which sampled queries put most of their softmax, shared by 64 or 128 queries.

    Args:
        size: keys per block: 16, 32, 64 or 128.
        query_block_size: how many positions choose their blocks together in prefill: 64 or 128.
        sample_stride: in prefill one query in so many is scored against all keys to choose blocks: 4, 8, 16, 32 or 64.
        min_mass: kept mass in (0, 1) to aim at in prefill: where the sampled queries keep less within the budget, their
            block of queries attends more key blocks. None for the budget alone.
        max_factor: the most that ``min_mass`` may attend, as a multiple of the budget's blocks, at least 1.
    """

    size: int = 32
    query_block_size: int = 64
    sample_stride: int = 16
    min_mass: float | None = None
    max_factor: float = 4.0

    shorthand: ClassVar = {"size": "block_size"}
    index_kind: ClassVar = "pages"
    needs_index: ClassVar = True
    counts_attended: ClassVar = True
    chooses_together: ClassVar = True
    estimates: ClassVar = True
    # Every backend counts query blocks on the host.
    on_host: ClassVar = (*Selection.on_host, ("prefill", "triton"))

    def __post_init__(self) -> None:
        sizes = (("size", BLOCK_SIZES), ("query_block_size", QUERY_BLOCK_SIZES), ("sample_stride", SAMPLE_STRIDES))
        for name, allowed in sizes:
            spelled = self.shorthand.get(name, name)
            object.__setattr__(self, name, check_integer(spelled, getattr(self, name), 1))
            check_choice(spelled, getattr(self, name), allowed)
        if self.min_mass is not None:
            mass = check_number("min_mass", self.min_mass, "a number in (0, 1), or None", lambda v: 0 < v < 1)
            object.__setattr__(self, "min_mass", mass)
        factor = check_number("max_factor", self.max_factor, "a number of at least 1", lambda v: v >= 1)
        object.__setattr__(self, "max_factor", factor)

    @property
    def settings(self) -> BlockSettings:
        """How prefill cuts and chooses blocks."""
        return BlockSettings(
            self.size, self.query_block_size, self.sample_stride, self.min_mass or 0.0, self.max_factor
        )

    @property
    def page_size(self) -> int:
        """Pages are blocks."""
        return self.size

    @property
    def enlarges(self) -> bool:
        """Whether it has a mass to aim at."""
        return self.min_mass is not None

    def mask(self, problem: Problem, scores: torch.Tensor, decode: bool = False) -> torch.Tensor:
        """The definition, bool ``[B, Hq, Lq, Lk]``; see ``Selection.mask``."""
        scores = final_scores(problem, scores)
        if decode:
            return page_mask(problem, scores, self.size)
        return chosen_mask(problem, block_choice(problem, scores, self.settings), self.settings)

    def choice(self, problem: Problem) -> Choice:
        """The blocks, chosen once more by the computation of the forward pass on the same tensors: they are the same.

        Keeping them instead would make an output's shape depend on what is in ``visible``.
        """
        return ChosenBlocks(problem, self.settings)

    def prefill_torch(self, problem: Problem, mark: Mark = no_mark) -> AttentionResult:
        """In PyTorch; see ``torch``. ``mark`` is for timing the steps, see ``blocks.Mark``."""
        return torch_block_attention(problem, self.settings, mark)

    def prefill_triton(self, problem: Problem, mark: Mark = no_mark) -> AttentionResult:
        """In kernels; see ``prefill``."""
        from nc_patch.selections.block.prefill import triton_block_attention

        return triton_block_attention(problem, self.settings, mark)

    def decode_torch(self, problem: Problem) -> AttentionResult:
        """By page statistics, in PyTorch; see ``torch_decode``."""
        return torch_block_decode(problem)

    def decode_triton(self, problem: Problem) -> AttentionResult:
        """By page statistics, in kernels; see ``decode``."""
        from nc_patch.selections.block.decode import triton_block_decode

        return triton_block_decode(problem)
