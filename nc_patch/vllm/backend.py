"""The backend that vLLM chooses: which layers it can run, and the size of their blocks."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from nc_patch.vllm.attention import SparseAttention
from nc_patch.vllm.blocks import bytes_per_key
from nc_patch.vllm.settings import alignment, current_settings
from nc_patch.vllm.step import SparseMetadataBuilder


class SparseBackend(AttentionBackend):
    """Decoding by pages, and prefill by the configured selection, over vLLM's paged cache."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = []  # validate_configuration refuses some

    get_name = staticmethod(lambda: "CUSTOM")  # in whose place it is registered
    get_impl_cls = staticmethod(lambda: SparseAttention)
    get_builder_cls = staticmethod(lambda: SparseMetadataBuilder)
    supported_kv_cache_layouts = classmethod(lambda cls: (KVCacheLayout.LBHNC,))  # a block and head lie together
    supports_sink = classmethod(lambda cls: True)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Whole pages, and whole blocks of queries, so that a shared prefix ends between two."""
        return [MultipleOf(alignment(current_settings()))]

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Why a layer cannot be run, and what to do; empty where it can."""
        if asked["use_mla"]:
            return ["multi-head latent attention (MLA) keeps no keys of heads to choose from; leave nc_patch out"]
        reasons = []
        if asked["has_sliding_window"]:
            reasons.append(
                "a layer has a sliding window; give such layers another backend, for example --attention-config "
                """'{"backend_per_kind": {"sliding_window": "CPU_ATTN"}}' on a CPU"""
            )
        if asked["attn_type"] != AttentionType.DECODER:
            reasons.append(f"attention of an {asked['attn_type']} is not causal; leave nc_patch out")
        if is_quantized_kv_cache(asked["kv_cache_dtype"] or "auto"):
            reasons.append(f"it cannot read a cache in {asked['kv_cache_dtype']}; use --kv-cache-dtype auto")
        if asked.get("use_dcp") or asked.get("use_pcp"):
            reasons.append("context parallelism spreads the keys of a sequence; use --tensor-parallel-size instead")
        allowed = {"has_sliding_window": False, "use_dcp": False, "use_pcp": False, "attn_type": AttentionType.DECODER}
        return reasons + super().validate_configuration(**{**asked, **allowed})

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Room in each block for the statistics of its pages, so that they are shared, copied and offloaded with it."""
        if spec.state_content_bytes is not None:
            return spec
        content = bytes_per_key(spec.head_size, spec.head_size_v, spec.dtype, current_settings().decode.page_size)
        return replace(spec, state_content_bytes=content)
