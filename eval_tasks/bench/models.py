"""Whole models with random weights, dense and patched: tokens a second of ``generate``, and of forward passes.

The model is a Llama with few layers and a small vocabulary, so that attention has about the share of the time that it
has in the whole model. Random weights attend almost evenly: this says how fast, and nothing about how good.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval_tasks.bench.inputs import GEOMETRIES
from eval_tasks.bench.measure import NO_TIME, OK, Row, fail
from eval_tasks.bench.operator import Settings
from nc_patch.patch import patched

CACHES = ("dynamic", "static")
_VOCABULARY = 1024
_LAYERS = {"cpu": 2, "cuda": 4}
_TOKENS = {"cpu": 12, "cuda": 64}
# New tokens at the beginning that are not timed: compilation, and the first growth of buffers.
_SKIPPED = {"cpu": 3, "cuda": 16}
_GENERATIONS, _FORWARDS = 2, 3


def measure_models(what: str, settings: Settings, lengths: tuple[int, ...], deadline: float) -> Iterator[Row]:
    """One row for each geometry, batch, length and attention: tokens a second, or why there are none.

    ``what`` is ``"generate"``, with each kind of cache after a prompt that all read densely and that is not timed, or
    ``"forward"``, over a prompt without a cache and with the last token's logits alone. Nothing begins after the
    deadline (``time.monotonic``).
    """
    runs: dict[str, Callable[[Any, torch.Tensor], list[float]]] = {"none": _forward_rates}
    if what == "generate":
        runs = {cache: partial(_generate_rates, cache=cache) for cache in CACHES}
    for geometry in settings.geometry:
        model = random_model(geometry, max(lengths), settings)
        for case in ((b, n, c) for b in settings.batch for n in sorted(lengths) for c in runs):
            known = {"geometry": geometry, **dict(zip(("batch", "length", "cache"), case, strict=True))}
            generator = torch.Generator().manual_seed(settings.seed)
            ids = torch.randint(1, _VOCABULARY, case[:2], generator=generator).to(settings.device)
            for method in ("dense", *settings.selections):
                row = {**known, "method": method, "kind": "dense" if method == "dense" else "sparse", "status": OK}
                if time.monotonic() > deadline:
                    yield row | {"status": NO_TIME, "message": "the time was used up before this case"}
                    continue
                phases = ("dense", method) if what == "generate" else (method, "dense")
                attention = nullcontext() if method == "dense" else patched(model, config=settings.config(*phases))
                try:
                    with torch.inference_mode(), attention:
                        rates = runs[case[2]](model, ids)
                    row |= {"tokens_per_second": statistics.median(rates), "tokens_per_second_of_each_run": rates}
                    row["layers"] = _LAYERS[settings.device.type]
                except Exception as error:
                    fail(row, error)
                yield row


def random_model(name: str, length: int, settings: Settings) -> Any:
    """A Llama of a geometry's shape with few layers and random weights, in evaluation mode."""
    geometry, device = GEOMETRIES[name], settings.device
    sizes = {name: getattr(geometry, name) for name in ("head_dim", "hidden_size", "intermediate_size")}
    sizes |= {"num_attention_heads": geometry.heads, "num_key_value_heads": geometry.kv_heads}
    sizes |= {"vocab_size": _VOCABULARY, "num_hidden_layers": _LAYERS[device.type]}
    sizes["max_position_embeddings"] = length + _TOKENS[device.type]
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(settings.seed)
    with torch.device(device):
        return LlamaForCausalLM(config).to(settings.dtype).eval()


def _generate_rates(model: Any, ids: torch.Tensor, cache: str) -> list[float]:
    tokens, skipped, rates = _TOKENS[ids.device.type], _SKIPPED[ids.device.type], []
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    options["cache_implementation"] = "static" if cache == "static" else None
    if ids.device.type == "cuda":
        torch._dynamo.reset()  # PyTorch limits how often one model is compiled, and each attention compiles it anew
    for _ in range(1 + _GENERATIONS):
        times = list[float]()  # of the prompt, and of each token
        streamer = SimpleNamespace(put=lambda _, times=times: times.append(time.perf_counter()), end=lambda: None)
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
        timed = times[1 + skipped :]
        rates.append(len(ids) * (len(timed) - 1) / (timed[-1] - timed[0]))
    return rates[1:]


def _forward_rates(model: Any, ids: torch.Tensor) -> list[float]:
    rates = []
    for _ in range(1 + _FORWARDS):
        begin = time.perf_counter()
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
        is_finite = bool(logits.isfinite().all())  # waits for the device
        rates.append(ids.numel() / (time.perf_counter() - begin))
        if not is_finite:
            raise FloatingPointError("the logits are not finite")
    return rates[1:]
