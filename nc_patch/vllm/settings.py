"""The settings of an engine, ``additional_config["nc_patch"]``, and what else of its configuration they need."""

import math
from collections.abc import Mapping

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from nc_patch.common import shown
from nc_patch.config import NCConfig
from nc_patch.selections import Block
from nc_patch.serving import queries_together
from nc_patch.vllm import BACKEND

_latest: NCConfig | None = None


def settings_of(vllm_config: VllmConfig) -> NCConfig | None:
    """The settings of an engine; None where it has none. Errors as from ``NCConfig``."""
    every = vllm_config.additional_config
    given = every.get("nc_patch") if isinstance(every, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(
            f'additional_config["nc_patch"] must be an object with settings of NCConfig, got {shown(given)}'
        )
    config = NCConfig.from_dict({**({} if "selection" in given else {"decode": "block"}), **given})
    if not isinstance(config.decode, Block):
        raise ValueError(
            f'decode must be "block" in vLLM, whose cache keeps statistics of pages, got {config.decode!r}'
        )
    if config.track or config.on_drop != "ignore":
        raise ValueError("track and on_drop act in patched models; leave them out in vLLM")
    return config


def current_settings() -> NCConfig:
    """The settings of the engine that is being built, or else of the one that was built last in this process."""
    global _latest
    vllm_config = get_current_vllm_config_or_none()
    found = None if vllm_config is None else settings_of(vllm_config)
    _latest = found or _latest
    assert _latest is not None, "vLLM asks for a layer before it has read the settings"
    return _latest


def alignment(config: NCConfig) -> int:
    """Keys of which a block, and every chunk of a prompt but the last, holds a multiple: pages and query blocks."""
    return math.lcm(queries_together(config.prefill), config.decode.page_size)


def prepare(vllm_config: VllmConfig) -> None:
    """Checks the settings against the rest of an engine's configuration, and chooses the scheduler that cuts prompts.

    Raises:
        ValueError, TypeError: the settings, or what does not go with them; the message says what to do.
    """
    config, chosen, custom = settings_of(vllm_config), vllm_config.attention_config, AttentionBackendEnum.CUSTOM
    if custom.get_path() != BACKEND:
        return  # another plugin has taken its place
    if custom not in (chosen.backend, *(chosen.backend_per_kind or {}).values()):
        if config is None:
            return
        raise ValueError("nc_patch has settings and is not chosen: add --attention-backend CUSTOM, or leave them out")
    if config is None:
        raise ValueError(
            "--attention-backend CUSTOM is nc_patch, which needs its settings: add, for example, --additional-config "
            """'{"nc_patch": {"alpha": 4, "C": 0.6}}'"""
        )
    step, cache, model = alignment(config), vllm_config.cache_config, vllm_config.model_config
    if model is not None:
        config.check_model(model.get_total_num_hidden_layers(), model.model_arch_config.total_num_attention_heads)
    scheduling, drafts = vllm_config.scheduler_config, vllm_config.speculative_config
    rows = 1 if drafts is None else 1 + (drafts.num_speculative_tokens or 0)
    least = step + (scheduling.max_num_seqs - 1) * rows
    tokens, chunk = scheduling.max_num_batched_tokens, scheduling.long_prefill_token_threshold
    if cache.user_specified_block_size and cache.block_size % step:
        raise ValueError(f"block_size must be a multiple of {step}, got {cache.block_size}: a block holds whole pages")
    if tokens < least:
        raise ValueError(
            f"max_num_batched_tokens must be at least {least}, got {tokens}: {step} tokens of a prompt must fit beside "
            f"max_num_seqs={scheduling.max_num_seqs} requests"
        )
    if 0 < chunk < step:
        raise ValueError(f"long_prefill_token_threshold must be 0 or at least {step}, got {chunk}")
    if scheduling.scheduler_cls is None:
        kind = "AlignedAsyncScheduler" if scheduling.async_scheduling else "AlignedScheduler"
        scheduling.scheduler_cls = f"nc_patch.vllm.scheduler.{kind}"
