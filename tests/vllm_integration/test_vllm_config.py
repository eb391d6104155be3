"""What is refused when an engine starts, and what a block of the cache costs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/setup_vllm.sh makes an environment with it")

from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from nc_patch import NCConfig
from nc_patch.vllm.blocks import bytes_per_key
from nc_patch.vllm.settings import settings_of

SETTINGS = {"alpha": 4, "C": 0.6}


def engine_config(model: str, settings: Any, **options: Any) -> Any:
    given = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "dtype": "float32", "attention_backend": "CUSTOM"}
    extra = {} if settings is None else {"additional_config": {"nc_patch": settings}}
    return EngineArgs(model=model, max_model_len=1024, **given | options, **extra).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"C": 0.5}, {}, "alpha is missing"),
        ([4, 0.6], {}, r'additional_config\["nc_patch"\] must be an object'),
        ({**SETTINGS, "decode": "topk"}, {}, 'decode must be "block" in vLLM'),
        ({**SETTINGS, "track": True}, {}, "track and on_drop act in patched models"),
        ({"alpha": [4, 4]}, {}, "alpha has 2 layers, the model has 30"),
        (None, {}, "CUSTOM is nc_patch, which needs its settings"),
        (SETTINGS, {"attention_backend": None}, "add --attention-backend CUSTOM"),
        (SETTINGS, {"block_size": 32}, "block_size must be a multiple of 64"),
        (SETTINGS, {"max_num_batched_tokens": 66}, "max_num_batched_tokens must be at least 67"),
        (SETTINGS, {"long_prefill_token_threshold": 32}, "long_prefill_token_threshold must be 0 or at least 64"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_with_what_is_allowed(model, settings, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        engine_config(model, settings, **options)


def test_settings_have_the_defaults_of_nc_config_and_decode_by_pages():
    assert settings_of(SimpleNamespace(additional_config={"nc_patch": SETTINGS})) == NCConfig(4, 0.6, decode="block")


def test_a_plain_engine_stays_as_it_is(model):
    config = engine_config(model, None, attention_backend=None)
    assert config.scheduler_config.scheduler_cls is None
    assert engine_config(model, SETTINGS).scheduler_config.scheduler_cls == "nc_patch.vllm.scheduler.AlignedScheduler"


@pytest.fixture(scope="module")
def configured(model):
    config = engine_config(model, SETTINGS)
    with set_current_vllm_config(config):
        yield config


def layer(**asked: Any) -> AttentionSelectorConfig:
    return AttentionSelectorConfig(
        **{"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None, **asked}
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"has_sliding_window": True}, "sliding window; give such layers another backend, .*backend_per_kind"),
        ({"use_mla": True}, r"multi-head latent attention \(MLA\)"),
        ({"attn_type": "encoder_only"}, "encoder_only is not causal"),
        ({"kv_cache_dtype": "fp8"}, "a cache in fp8; use --kv-cache-dtype auto"),
        ({"use_dcp": True}, "context parallelism .* use --tensor-parallel-size"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention"),
    ],
)  # fmt: skip
def test_layers_that_it_cannot_run_are_refused_with_the_remedy(configured, asked, message):
    from vllm.platforms import current_platform

    with pytest.raises(ValueError, match=f"nc_patch cannot run a layer of this model: .*{message}"):
        current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, layer(**asked))
    assert current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, layer()).startswith("nc_patch.")
    plain = current_platform.get_attn_backend_cls(AttentionBackendEnum.CPU_ATTN, layer())
    assert plain == AttentionBackendEnum.CPU_ATTN.get_path()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alibi_slopes": [1.0]}, "ALiBi"), ({"kv_sharing_target_layer_name": "layers.0"}, "the cache of layers.0")],
)
def test_layers_with_alibi_or_a_cache_of_others_are_refused(configured, options, message):
    from nc_patch.vllm.attention import SparseAttention

    with pytest.raises(NotImplementedError, match=message):
        SparseAttention(9, 64, 0.125, 3, **options)


def test_the_specification_of_a_cache_has_room_for_statistics_once(configured):
    from nc_patch.vllm.backend import SparseBackend

    spec = FullAttentionSpec(block_size=64, num_kv_heads=3, head_size=64, dtype=torch.float32)
    larger = SparseBackend.customize_spec(spec)
    assert larger.page_size_bytes == 64 * 3 * bytes_per_key(64, 64, torch.float32, 16)
    assert SparseBackend.customize_spec(larger) == larger


@pytest.mark.parametrize(
    ("computed", "prompt", "wanted", "got"),
    [
        (0, 500, 500, 500), (0, 500, 300, 256), (256, 500, 200, 192), (448, 500, 52, 52), (0, 500, 63, 0),
        (0, 500, 640, 500), (500, 500, 140, 140), (600, 500, 5, 5), (70, 500, 100, 58), (0, 40, 40, 40),
    ],
)  # fmt: skip
def test_chunks_of_a_prompt_end_between_blocks_of_queries_or_with_the_prompt(computed, prompt, wanted, got):
    """Also where a request that was preempted comes back with tokens that it had generated."""
    from nc_patch.vllm.scheduler import AlignedScheduler

    scheduler = object.__new__(AlignedScheduler)
    scheduler._step, scheduler._recurrent = 64, False
    request = SimpleNamespace(num_computed_tokens=computed, num_prompt_tokens=prompt)
    assert scheduler._mamba_block_aligned_split(request, wanted) == got
