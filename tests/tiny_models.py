"""Tiny decoders built from config, one of each kind of attention; the one list that parametrised tests run over."""

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_GEMMA2 = {"sliding_window": 9, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
_GPT_OSS = {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2}

# name: (class, config class, further settings, the dense implementation to compare with)
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}, "sdpa"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 11}, "sdpa"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}, "sdpa"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA2, "eager"),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", _GPT_OSS, "eager"),
}


def tiny_model(family: str, **settings: object) -> PreTrainedModel:
    """A tiny model of a family in evaluation mode, with weights large enough that attention matters."""
    model_class, config_class, further, implementation = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**{**_SHAPE, **further, **settings})
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.set_attn_implementation(implementation)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids that are not padding."""
    return torch.randint(1, VOCABULARY, shape)


def eager_weights(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What the queries of every layer put on each key, ``[B, Hq, L, L]`` in float64; the model stays eager."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [weights.double() for weights in model(ids, output_attentions=True).attentions]
