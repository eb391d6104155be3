"""``TopK``: the keys with the highest scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from nc_patch.common import check_choice, check_integer
from nc_patch.ops.means import PageMeans, page_means, page_starts
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rounding import rounding_bounds
from nc_patch.ops.rows import Rows
from nc_patch.selections.base import Selection, register
from nc_patch.selections.topk import layouts  # noqa: F401  registers them
from nc_patch.selections.topk.torch import best_rivals, forced_counts

# So few queries on a CPU read keys as they are; for more it pays to lay them out anew.
_FEW_QUERIES = 4


@register("topk")
@dataclass(frozen=True)
class TopK(Selection):
    """The first ``sink_keys`` and last ``recent_keys`` visible keys, and of the others those with the highest scores.

    The recent keys come first in the budget, then the sinks. Ties go to the lower position; NaN is above every score.

    Args:
        sink_keys, recent_keys: the first and the last visible keys, attended always, within the budget.
        tail: what is done with the keys that are not attended. ``"mean"``: every page of 16 keys enters as one more
            key, its mean, which counts as often as the page has keys that are not attended; this costs a sixteenth of
            dense attention more. ``"drop"``: nothing, which is the paper's definition.
    """

    sink_keys: int = 4
    recent_keys: int = 1
    tail: str = "mean"

    checks: ClassVar = {
        **dict.fromkeys(("sink_keys", "recent_keys"), partial(check_integer, least=0)),
        "tail": partial(check_choice, allowed=("mean", "drop")),
    }
    index_kind: ClassVar = "codes"
    bounds_kept_mass: ClassVar = True

    def keep(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The definition, bool ``[H or 1, R, N]``; see ``Selection.keep``."""
        position, seen = rows.positions(scores.shape[-1]), rows.seen(scores.shape[-1])
        sinks, recents = forced_counts(rows.budget, self.sink_keys, self.recent_keys)
        begin, stop = rows.visible[:, 0] + sinks, rows.visible[:, 1] - recents
        rival = (position >= begin[..., None]) & (position < stop[..., None])
        return best_rivals(scores, rival, rows.budget - sinks - recents) | (seen & ~rival)

    @property
    def uses_means(self) -> bool:
        """Whether page means stand for what is not attended."""
        return self.tail == "mean"

    def takes_in(self, problem: Problem, backend: str) -> bool:
        """In kernels, while decoding by codes."""
        return problem.phase == "decode" and backend != "torch"

    def with_means(self, problem: Problem, backend: str) -> Problem:
        """The problem with its page means: those that are kept, or new ones; without any where they do not count."""
        if not self.uses_means:
            return super().with_means(problem, backend)
        if problem.means is not None:
            return problem
        starts = page_starts(problem.visible, problem.origin, problem.key.shape[2])
        make = page_means
        if backend == "triton":
            from nc_patch.ops.triton.means import triton_page_means as make
        means = make(problem.key, problem.value, starts)
        if backend == "cpu":  # whose kernels multiply what is between the pages of two sequences by zero
            means = PageMeans(*(mean.masked_fill_((starts < 0)[:, None, :, None], 0.0) for mean in means))
        return problem._replace(means=means)

    def prefill_triton(self, problem: Problem) -> AttentionResult:
        """Two kernels: a search for each row's threshold, and the attention; see ``threshold``."""
        from nc_patch.ops.triton.launch import launch_attention
        from nc_patch.selections.topk.threshold import threshold_kernel

        return launch_attention(self.with_means(problem, "triton"), self.sink_keys, self.recent_keys, threshold_kernel)

    def prefill_cpu(self, problem: Problem) -> AttentionResult:
        """In compiled kernels; see ``cpu``, and for few queries ``cpu_decode``."""
        from nc_patch.selections.topk.cpu import cpu_topk_attention

        if problem.query.shape[2] <= _FEW_QUERIES:
            return self.decode_cpu(problem)
        return cpu_topk_attention(self.with_means(problem, "cpu"), self.sink_keys, self.recent_keys)

    def decode_torch(self, problem: Problem) -> AttentionResult:
        """By every score, as a prefill; the codes are for kernels."""
        return self._bounded(problem, self.prefill_torch)

    def decode_cpu(self, problem: Problem) -> AttentionResult:
        """By codes, in compiled kernels; see ``cpu_decode``."""
        from nc_patch.selections.topk.cpu_decode import cpu_topk_decode

        forced = self.sink_keys, self.recent_keys
        return self._bounded(problem, lambda like: cpu_topk_decode(self.with_means(like, "cpu"), *forced))

    def _bounded(self, problem: Problem, run: Callable[[Problem], AttentionResult]) -> AttentionResult:
        """What ``run`` returns, with bounds of the kept mass where they are asked for: from that of every score."""
        result = run(problem._replace(stats=problem.stats or problem.bounds))
        if not problem.bounds:
            return result
        assert result.kept_mass is not None
        bounds = rounding_bounds(result.kept_mass, problem)
        return result._replace(kept_mass=result.kept_mass if problem.stats else None, kept_mass_bounds=bounds)

    def bound(self, problem: Problem, backend: str) -> Callable[[Problem], AttentionResult]:
        """While decoding by codes in kernels, their launches."""
        if (backend, problem.phase) != ("triton", "decode") or self.uses_means != (problem.means is not None):
            return super().bound(problem, backend)
        from nc_patch.selections.topk.decode import bound_topk_decode

        return bound_topk_decode(problem, self.sink_keys, self.recent_keys)

    def decode_triton(self, problem: Problem) -> AttentionResult:
        """By codes, in kernels; see ``decode``."""
        problem = self.with_means(problem, "triton")
        return self.bound(problem, "triton")(problem)
