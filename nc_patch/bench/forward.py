"""Whole forward passes over a prompt: a decoder with random weights, dense and patched.

The model is that of ``generate``: a Llama of the geometry's shape with few layers and a small vocabulary. Logits are
made for the last token alone and no cache is kept, as far as that is the same for all. Random weights attend almost
evenly: this says how fast, and nothing about how good.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nc_patch.bench.cases import OK, Case, Row, Settings, fail, is_wanted, new_row
from nc_patch.bench.generate import random_model
from nc_patch.bench.machine import PeakMemory
from nc_patch.patch import patched

_RUNS, _GROWTH = 3, 2.0


def measure_forward(settings: Settings, lengths: tuple[int, ...], deadline: float) -> Iterator[Row]:
    """One row for each geometry, batch, length and attention: seconds, or why there are none."""
    before: list[Row] = []
    for geometry in settings.geometries:
        model = random_model(geometry, max(lengths), settings)
        for batch, length in ((batch, length) for batch in settings.batches for length in sorted(lengths)):
            for method in ("dense", *settings.selections):
                case, kind = Case(geometry, batch, length), "dense" if method == "dense" else "sparse"
                row = new_row(case, method, kind)
                if is_wanted(row, before, deadline, _GROWTH, always=method in ("dense", "block")):
                    try:
                        row |= _measure(model, settings, batch, length, method, deadline)
                    except Exception as error:
                        fail(row, error)
                before.append(row)
                yield row


def table(rows: list[Row]) -> str:
    """The rows as a table, with the speed over dense attention."""
    lines = ["", "forward, a random model of few layers: milliseconds (speed over dense)"]
    for row in rows:
        case = f"{row['geometry']}, batch {row['batch']}, {row['length']:,} tokens"
        said = f"{row['status']}: {row.get('message')}"
        if row["status"] == OK:
            same = {name: row[name] for name in ("geometry", "batch", "length")}
            dense = [r for r in rows if r["method"] == "dense" and r["status"] == OK and same.items() <= r.items()]
            over = f" ({dense[0]['median_seconds'] / row['median_seconds']:.2f}x)" if dense else ""
            said = f"{1e3 * row['median_seconds']:,.1f}{over}"
        lines.append(f"  {case:40} {row['method']:7} {said}")
    return "\n".join(lines)


def _measure(model: Any, settings: Settings, batch: int, length: int, method: str, deadline: float) -> dict[str, Any]:
    device = settings.device
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(device)
    attention: AbstractContextManager[Any] = nullcontext()
    if method != "dense":
        attention = patched(model, config=settings.config(method, "dense"))
    seconds: list[float] = []
    with torch.inference_mode(), attention:
        peak = PeakMemory(device)
        model(ids, use_cache=False, logits_to_keep=1)
        memory = peak.bytes()
        while len(seconds) < _RUNS and (not seconds or time.monotonic() < deadline):
            begin = time.perf_counter()
            logits = model(ids, use_cache=False, logits_to_keep=1).logits
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("the logits are not finite")
    return {
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "tokens_per_second": batch * length / statistics.median(seconds),
        "peak_bytes": memory,
        "layers": model.config.num_hidden_layers,
    }
