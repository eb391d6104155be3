"""What one step of the engine computes, prepared once for all layers: rows that decode, and chunks of prompts."""

from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from nc_patch.common import once
from nc_patch.ops.derivatives import is_capturing
from nc_patch.paged import PagedRows
from nc_patch.serving import Chunk, chunk
from nc_patch.vllm.settings import current_settings


class SparseMetadata(NamedTuple):
    """A step: rows of requests that are past their prompt, one each or several that verify drafts; chunks of prompts.

    Attributes:
        rows, requests: int64 ``[R]``, each row's place among the step's queries, and its request.
    """

    rows: torch.Tensor
    requests: torch.Tensor
    chunks: list[Chunk]
    step: CommonAttentionMetadata

    def decoding(self) -> PagedRows:
        """What the rows see; computed on the device by the first layer that asks, so that a CUDA graph of all layers
        holds it.
        """
        found: PagedRows = once(self.rows, ("decoding", is_capturing(self.rows)), self._decoding)
        return found

    def _decoding(self) -> PagedRows:
        step, requests = self.step, self.requests
        after = step.query_start_loc[1:][requests] - 1 - self.rows
        lengths = (step.seq_lens[requests] - after).int()
        # A power of two, so that the sizes of buffers seldom change.
        most_keys = 1 << (step.max_seq_len - 1).bit_length()
        return PagedRows(step.block_table_tensor[requests], lengths, lengths[:, None], most_keys)


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    """Prepares a step. One that decodes the same number of queries for each request fits in a CUDA graph."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._prefill = current_settings().prefill
        self._captured: list[SparseMetadata] = []

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseMetadata:
        """Requests past their prompt decode, also where several of their tokens are computed at once."""
        step = common_attn_metadata
        starts, bound = step.query_start_loc_cpu, step.seq_lens_cpu_upper_bound
        lengths = (step.seq_lens if bound is None else bound).tolist()
        prefilling = (starts.diff() > 1 if step.is_prefilling is None else step.is_prefilling).tolist()
        chunks, decoding = [], []
        for number, (start, end) in enumerate(pairwise(starts.tolist())):
            length = lengths[number]
            if not prefilling[number]:
                decoding += [(row, number) for row in range(start, end)]
            elif end > start:
                chunks.append(chunk(slice(start, end), length, step.block_table_tensor[number], self._prefill, True))
        places = torch.tensor(decoding, dtype=torch.int64).view(-1, 2).t().contiguous()
        rows, requests = places.to(self.device, non_blocking=True)
        return SparseMetadata(rows, requests, chunks, step)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> SparseMetadata:
        """Kept, since the graph reads its tensors at every replay."""
        self._captured.append(self.build(0, common_attn_metadata))
        return self._captured[-1]
