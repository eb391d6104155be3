"""Whole steps of ``generate``: tokens a second of a decoder with random weights, dense and patched.

The model is a Llama of the geometry's shape with few layers and a small vocabulary, so that attention has about the
share of the time that it has in the whole model. The prompt is read densely by all, and not timed. Random weights
attend almost evenly: this says how fast, and nothing about how good.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nc_patch.bench.cases import NO_TIME, OK, Row, Settings, fail
from nc_patch.bench.inputs import GEOMETRIES
from nc_patch.patch import patched

CACHES = ("dynamic", "static")
_VOCABULARY = 1024
_LAYERS = {"cpu": 2, "cuda": 4}
_TOKENS = {"cpu": 12, "cuda": 64}
# New tokens at the beginning that are not timed: compilation, and the first growth of buffers.
_SKIPPED = {"cpu": 3, "cuda": 16}
_RUNS = 2


class TokenTimes:
    """A streamer of ``generate`` that keeps when each token came; the first entry is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate`` with tokens that are on the host already."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` when it is done."""


def measure_generate(settings: Settings, lengths: tuple[int, ...], deadline: float) -> Iterator[dict[str, Any]]:
    """One row for each geometry, batch, length, cache, and attention: tokens a second, or why there are none."""
    for geometry in settings.geometries:
        model = random_model(geometry, max(lengths), settings)
        for batch, length in ((batch, length) for batch in settings.batches for length in sorted(lengths)):
            for cache in CACHES:
                for method in ("dense", *settings.selections):
                    known = {"geometry": geometry, "batch": batch, "length": length, "cache": cache, "method": method}
                    if time.monotonic() > deadline:
                        yield {**known, "status": NO_TIME, "message": "the time was used up before this case"}
                        continue
                    row: Row = {**known, "status": OK}
                    try:
                        row |= _measure(model, settings, batch, length, cache, method)
                    except Exception as error:
                        fail(row, error)
                    yield row


def random_model(name: str, length: int, settings: Settings) -> Any:
    """A Llama of a geometry's shape with few layers and random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    geometry, device = GEOMETRIES[name], settings.device
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=_LAYERS[device.type],
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=length + _TOKENS[device.type],
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(settings.seed)
    torch.set_default_dtype(settings.dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, with the speed over dense attention with the same cache."""
    lines = ["", "generate, a random model of few layers: tokens a second (speed over dense with the same cache)"]
    for row in rows:
        case = f"{row['geometry']}, batch {row['batch']}, {row['length']:,} tokens, {row['cache']} cache"
        said = f"{row['status']}: {row.get('message')}"
        if row["status"] == OK:
            same = {name: row[name] for name in ("geometry", "batch", "length", "cache")}
            dense = [r for r in rows if r["method"] == "dense" and r["status"] == OK and same.items() <= r.items()]
            over = f" ({row['tokens_per_second'] / dense[0]['tokens_per_second']:.2f}x)" if dense else ""
            said = f"{row['tokens_per_second']:.1f}{over}"
        lines.append(f"  {case:50} {row['method']:7} {said}")
    return "\n".join(lines)


def _measure(model: Any, settings: Settings, batch: int, length: int, cache: str, method: str) -> dict[str, Any]:
    device = settings.device.type
    ids = torch.randint(1, _VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(settings.seed))
    ids = ids.to(settings.device)
    attention: AbstractContextManager[Any] = nullcontext()
    if method != "dense":
        attention = patched(model, config=settings.config("dense", method))
    rates = []
    if device == "cuda":
        torch._dynamo.reset()  # PyTorch limits how often one model is compiled, and each attention compiles it anew
    with torch.inference_mode(), attention:
        for _ in range(1 + _RUNS):
            times = TokenTimes()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_TOKENS[device],
                min_new_tokens=_TOKENS[device],
                do_sample=False,
                cache_implementation="static" if cache == "static" else None,
                streamer=times,
            )
            timed = times.times[1 + _SKIPPED[device] :]
            rates.append(batch * (len(timed) - 1) / (timed[-1] - timed[0]))
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "tokens_per_second_of_each_run": rates[1:],
        "layers": _LAYERS[device],
        "new_tokens": _TOKENS[device],
    }
