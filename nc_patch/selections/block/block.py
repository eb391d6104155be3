"""``Block``: key blocks that a block of queries chooses together; while decoding, pages that each query chooses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.reference import final_scores
from nc_patch.selections.base import Choice, Selection, register
from nc_patch.selections.block.audit import judged
from nc_patch.selections.block.blocks import BlockOptions, plan_of
from nc_patch.selections.block.definition import block_choice, chosen_mask, page_mask
from nc_patch.selections.block.torch import choose_blocks, chosen_blocks, torch_block_decode


@register("block")
@dataclass(frozen=True)
class Block(BlockOptions):
    """Blocks of keys: in prefill those that sampled queries put most of their softmax on, shared by a block of queries.

    Args:
        size: keys per block: 16, 32, 64 or 128.
        query_block_size: how many positions choose their blocks together in prefill: 32, 64 or 128.
        sample_stride: in prefill one query in so many is scored against all keys to choose blocks: 1, 2, 4, ... or 64.
            None follows the budget: the power of two, from 2 to 64, nearest to n / (2 * k(n)) for a query block that
            sees n keys, so that choosing costs as much as attending and a prompt of n tokens n^(1+C) in all.
        local_keys: in prefill so many keys before a query block are attended always, within the budget.
        min_mass: kept mass in (0, 1) to aim at in prefill: where the sampled queries keep less within the budget, their
            block of queries attends more key blocks. None for the budget alone.
        max_factor: the most that ``min_mass`` may attend, as a multiple of the budget's blocks, at least 1.
    """

    index_kind: ClassVar = "pages"
    needs_index: ClassVar = True
    counts_attended: ClassVar = True
    chooses_together: ClassVar = True
    estimates: ClassVar = True
    # Every backend counts query blocks on the host.
    on_host: ClassVar = (*Selection.on_host, ("prefill", "triton"))

    @property
    def page_size(self) -> int:
        """Pages are blocks."""
        return self.size

    def takes_in(self, problem: Problem, backend: str) -> bool:
        """In kernels; on a GPU one key of one query: the page that it completes is the query's own, and not read."""
        one = problem.new == 1 and problem.query.shape[2] == 1
        fits = backend == "cpu" or (backend == "triton" and one)
        return fits and problem.means is None and problem.phase == "decode"

    def mask(self, problem: Problem, scores: torch.Tensor, decode: bool = False) -> torch.Tensor:
        """The definition, bool ``[B, Hq, Lq, Lk]``; see ``Selection.mask``."""
        scores = final_scores(problem, scores)
        if decode:
            return page_mask(problem, scores, self.size)
        return chosen_mask(problem, block_choice(problem, scores, self), self)

    def choice(self, problem: Problem) -> Choice:
        """The blocks, chosen anew by the same computation: kept, they would have a shape that ``visible`` decides."""
        plan = plan_of(problem, self)
        return chosen_blocks(problem, plan, choose_blocks(problem, plan, self)[0], self.size)

    def prefill_torch(self, problem: Problem) -> AttentionResult:
        """In PyTorch, see ``torch``; with statistics every score is computed."""
        plan = plan_of(problem, self)
        choice, expected = choose_blocks(problem, plan, self)
        result = chosen_blocks(problem, plan, choice, self.size).attend()
        return judged(result, problem, plan, self, choice, expected)

    def prefill_triton(self, problem: Problem) -> AttentionResult:
        """In kernels; see ``prefill``."""
        from nc_patch.selections.block.prefill import triton_block_attention

        return triton_block_attention(problem, self)

    def prefill_cpu(self, problem: Problem) -> AttentionResult:
        """In a compiled kernel; see ``cpu``. With ``min_mass`` in PyTorch."""
        if self.min_mass is not None:
            return self.prefill_torch(problem)
        from nc_patch.selections.block.cpu import cpu_block_attention

        return cpu_block_attention(problem, self)

    def decode_torch(self, problem: Problem) -> AttentionResult:
        """By page statistics, in PyTorch; see ``torch``."""
        return torch_block_decode(problem)

    def decode_cpu(self, problem: Problem) -> AttentionResult:
        """By page statistics, in compiled kernels; see ``cpu_decode``."""
        from nc_patch.selections.block.cpu_decode import cpu_block_decode

        return cpu_block_decode(problem)

    def bound(self, problem: Problem, backend: str) -> Callable[[Problem], AttentionResult]:
        """While decoding in kernels, their launches."""
        if backend != "triton" or problem.phase != "decode" or (problem.new and not self.takes_in(problem, backend)):
            return super().bound(problem, backend)
        from nc_patch.selections.block.decode import bound_block_decode

        return bound_block_decode(problem)

    def decode_triton(self, problem: Problem) -> AttentionResult:
        """By page statistics, in kernels; see ``decode``."""
        return self.bound(problem, "triton")(problem)
