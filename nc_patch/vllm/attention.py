"""Attention of one layer in vLLM: new keys into the cache, then the rows that decode and the chunks of prompts."""

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from nc_patch.paged import PagedKeys, summarize_slots_
from nc_patch.serving import ServedLayer
from nc_patch.vllm.blocks import paged_keys
from nc_patch.vllm.settings import current_settings
from nc_patch.vllm.step import SparseMetadata


class SparseAttention(AttentionImpl[SparseMetadata]):
    """One layer. A row attends what ``patch_model`` attends for its request alone."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, sinks: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        if alibi_slopes is not None:
            raise NotImplementedError("nc_patch cannot add ALiBi's slopes to scores; leave it out for this model")
        if kv_sharing_target_layer_name is not None:
            raise NotImplementedError(
                f"nc_patch cannot run a layer that reads the cache of {kv_sharing_target_layer_name}; leave it out for "
                "this model"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.softcap, self.sinks = float(logits_soft_cap or 0.0), sinks
        self.config = current_settings()
        first = get_tensor_model_parallel_rank() * num_heads
        self.heads = slice(first, first + num_heads)  # of the model's, those of this rank
        self._views: tuple[torch.Tensor, PagedKeys] | None = None

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Writes new keys and values ``[T, Hkv, D]`` to their slots, and statistics of the pages that they complete.

        A slot is ``block * N`` plus the place in the block; what is padding has -1, and goes to block 0, which vLLM
        reserves for it.
        """
        if kv_cache.numel() == 0:
            return
        paged, count = self._paged(layer, kv_cache), len(slot_mapping)
        slots, size = slot_mapping.clamp(min=0), kv_cache.shape[2]
        block, offset = slots // size, slots % size
        paged.key[block, :, offset] = key[:count]
        paged.value[block, :, offset] = value[:count]
        summarize_slots_(paged, slot_mapping, self.config.backend)

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
        attn_metadata: SparseMetadata | None, output: torch.Tensor, output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of a step's queries ``[T, Hq, D]`` into ``output`` ``[T, Hq, Dv]``; zeros while vLLM profiles."""
        if attn_metadata is None or kv_cache.numel() == 0:
            return output.zero_()
        paged = self._paged(layer, kv_cache)
        served = ServedLayer(
            *(self.config, extract_layer_index(layer.layer_name), self.scale, self.softcap, self.sinks, self.heads)
        )
        rows = attn_metadata.rows
        if len(rows):
            output[rows] = served.decode(query[rows], paged, attn_metadata.decoding()).output
        for chunk in attn_metadata.chunks:
            part = query[chunk.rows].transpose(0, 1)[None]
            output[chunk.rows] = served.prefill(part, paged, chunk)[0].output[0].transpose(0, 1)
        return output

    def _paged(self, layer: Any, kv_cache: torch.Tensor) -> PagedKeys:
        """Views of the cache, made when it is first seen."""
        if self._views is None or self._views[0] is not kv_cache:
            value_size = getattr(layer, "head_size_v", self.head_size)
            self._views = kv_cache, paged_keys(kv_cache, self.head_size, value_size, self.config.decode.page_size)
        return self._views[1]
