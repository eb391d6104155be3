"""Every causal language model class of the installed ``transformers``, found by walking the library, as a tiny model.

Two places are looked at, so that a class which stands in only one of them is found as well: the mapping of
``AutoModelForCausalLM``, and the source of every model directory, for classes named ``*ForCausalLM``. A model is built
from its own default config: every field that has a size is made small by its name, which families share; what a family
needs beside that stands in ``OVERRIDES``.
"""

import dataclasses
import importlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MAPPED

VOCABULARY = 97
LAYERS = 3

# The first pattern that matches a field's whole name gives its value; fields that match none keep their default.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"(text_|unpadded_|encoder_hash_byte_group_)?vocab(_size)?(_per_layer_input)?|ngram_vocab_size_base", VOCABULARY),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"(forced_)?eos_token_id", None),
    (r"(boi|eoi|image|video|audio|boa|eoa|eod|cls|sep|vision_start|vision_end)_token_(id|index)", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", 512),
    (r"(backbone_|input_embedding_|output_embedding_)?hidden_size(_global)?|d_model|n_embd|lru_width", 64),
    (r"embed_dim|embedding_size|embedding_dim|word_embed_proj_dim|dim|ple_embed_dim", 64),
    (r"(moe_|expert_|shared_expert_|moe_shared_expert_|shared_experts_)(intermediate_size|ffn_hidden_size)", 32),
    (r"(dense_|shared_|prefix_dense_)?intermediate_size(_mlp)?|n_inner|((en|de)coder_)?ffn_dim|ffn_hidden_size", 96),
    (r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|layers|(de|en)coder_layers|depth", LAYERS),
    (r"(num_)?((de|en)coder_)?attention_heads|n_heads?|num_heads|linear_num_((key|value)_)?heads", 4),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"((attention|indexer|index|qk_nope|mamba|linear(_(key|value))?)_)?head_dim|kv_channels|mamba_d_head", 16),
    (r"v_head_dim", 24),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"(q_lora_rank|o_lora_rank|hc_lowrank|kv_lora_rank|gated_norm_rank)", 16),
    (r"(num|n_routed|num_local|moe_num)_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r"sliding_window(_size)?|attention_window_size|local_attention(_window_len)?", 11),
    (r"attention_chunk_size", 13),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_n_heads|mamba_num_heads|(mamba_)?chunk_size", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"mamba_d_ssm", 128),
    (r"index_topk|index(er)?_n_heads", 4),
    (r"(pronunciation|shape)_(vocab_size|embed_dim)", 64),
    (r"is_decoder", True),
    (r".*(dropout|layerdrop)|(embd|resid)_pdrop", 0.0),
)
# Left out by default, these stay left out: a family without a window gets none.
_OPTIONAL = re.compile(r"sliding_window|attention_chunk_size|n_group|topk_group|q_lora_rank|.*dropout|n_inner")

# What cannot be built here; the suite still tries, so that an entry that is no longer true shows.
NOT_BUILT = {
    "gemma3n Gemma3nForConditionalGeneration": "its vision tower needs the package timm",
    "gemma4_assistant": "transformers refuses every config of it, its default among them",
    "gemma4_unified_assistant": "transformers refuses every config of it, its default among them",
}
# What a family needs beside the rules.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "csm": {"num_codebooks": 64},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma3n Gemma3nForCausalLM": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hrm_text": {"num_hidden_layers": 1, "L_cycles": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "mllama": {"cross_attention_layers": [1]},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen4_exp": {"indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds": False},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# What a model needs beside its config.
_AFTERWARDS = {"xmod": lambda model: model.set_default_language("en_XX")}


class Family(NamedTuple):
    """One class of ``transformers`` that predicts the next token.

    Attributes:
        name: directory below ``transformers.models``; the class's name follows it where a directory has several.
        module: the module that defines the class.
        class_name: the class.
    """

    name: str
    module: str
    class_name: str

    def load(self) -> type:
        """The class itself; imports its module."""
        return getattr(importlib.import_module(self.module), self.class_name)


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """All families, ordered by name; no model module is imported."""
    defined: dict[str, tuple[str, str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE):
            defined.setdefault(name, (path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}"))
    mapped = {name for names in MAPPED.values() for name in ((names,) if isinstance(names, str) else names)}
    found = mapped | {name for name in defined if name.endswith("ForCausalLM") and name != "AutoModelForCausalLM"}
    directories = [defined[name][0] for name in found]
    named = []
    for name in found:
        directory, module = defined[name]
        named.append(Family(directory if directories.count(directory) == 1 else f"{directory} {name}", module, name))
    return tuple(sorted(named))


def settings_of(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a config class tiny; those of nested configs are dictionaries."""
    default = vars(config_class())
    fields = {field.name: default.get(field.name) for field in dataclasses.fields(config_class)}
    settings: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            nested = settings_of(type(value), overrides.get(name, {}))
            settings[name] = {"model_type": value.model_type, **nested}
        elif (small := _tiny(name, value)) is not _KEEP:
            settings[name] = small
    heads = fields.get("num_attention_heads")
    if heads is not None and heads == fields.get("num_key_value_heads") and "kv_lora_rank" in fields:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention repeats no keys
        settings["head_dim"] = settings["qk_rope_head_dim"]
    settings |= _layers(fields, settings)
    given = {name: value for name, value in overrides.items() if not isinstance(fields.get(name), PreTrainedConfig)}
    known = set(fields) | set(given)
    return {name: value for name, value in (settings | given).items() if name in known}


def tiny_model(family: Family, implementation: str | None = None) -> PreTrainedModel:
    """A tiny model in evaluation mode, with each kind of layer that its family has by default, and with weights large
    enough that attention matters.

    ``implementation`` is the dense attention to run, by default what ``transformers`` chooses.
    """
    torch.manual_seed(1)
    model_class = family.load()
    config_class = model_class.config_class
    config = config_class(**settings_of(config_class, OVERRIDES.get(family.name, {})))
    model = model_class(config).eval()
    _AFTERWARDS.get(family.name, lambda model: None)(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


_KEEP = object()


def _tiny(name: str, default: Any) -> Any:
    for pattern, value in _SIZES:
        if re.fullmatch(pattern, name):
            return _KEEP if default is None and _OPTIONAL.fullmatch(name) else value
    return _KEEP


def _layers(fields: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer, cut down to a few layers among which every kind of layer is."""
    count = fields.get("num_hidden_layers")
    # A list of all layers' numbers is not one with an entry a layer: left out, it is made anew.
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == count and value != list(range(len(value)))
    }
    if not lists:
        return {}
    rows = [repr(row) for row in zip(*lists.values(), strict=True)]
    chosen = sorted({row: index for index, row in reversed(list(enumerate(rows)))}.values())
    others = [index for index in range(count) if index not in chosen]
    chosen = sorted([*chosen, *others[: max(LAYERS - len(chosen), 0)]])
    kept: dict[str, Any] = {name: [values[index] for index in chosen] for name, values in lists.items()}
    return kept | {"num_hidden_layers": len(chosen)}
