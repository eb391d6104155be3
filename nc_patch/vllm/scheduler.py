"""Schedulers that cut prompts where attention does not notice: between blocks of queries, and at the prompt's end."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from nc_patch.vllm.settings import alignment, settings_of


class AlignedScheduler(Scheduler):
    """Ends each chunk of a prompt at a multiple of its blocks of queries, or where the prompt ends.

    So a prompt in chunks chooses as if it were whole, whatever runs beside it, and what a request had generated before
    it was preempted is not taken for a part of its prompt. This is done where vLLM cuts prompts for recurrent layers;
    models that have these keep vLLM's own cuts.
    """

    need_mamba_block_aligned_split: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        config = settings_of(self.vllm_config)
        assert config is not None
        self._step, self._recurrent = alignment(config), self.need_mamba_block_aligned_split
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(self, request: Any, num_new_tokens: int, *computed: int) -> int:
        """How many of the new tokens are computed now, after those that a cache holds; 0 makes the request wait."""
        if self._recurrent:
            return int(super()._mamba_block_aligned_split(request, num_new_tokens, *computed))
        start, prompt = request.num_computed_tokens + sum(computed), request.num_prompt_tokens
        if start >= prompt:
            return num_new_tokens
        end = min(start + num_new_tokens, prompt)
        if end < prompt:
            end = end // self._step * self._step
        return max(end - start, 0)


class AlignedAsyncScheduler(AlignedScheduler, AsyncScheduler):
    """The same where vLLM schedules a step while the one before it runs."""
