"""Measures what the means of the keys and values that are not attended add, and writes docs/results/tail.json.

The tail: in every complete page before the query's own, the keys that are not attended enter the softmax as one key,
their mean, which counts as often as there are keys and carries the mean of their values. First the output error of
late queries as in ``measure_pages.py``, then the perplexity of the model with every layer and row sparse, over the last
tokens of each sample. Variances are left out there: they make the output error many times larger.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure_pages import LAYERS, STATISTICS, Layer, Measured, late_rows, mean_variance
from transformers import AttentionInterface

from eval_tasks.capture import capture, token_ids
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch.budget import budget_of
from nc_patch.common import check_directory

ERROR_LAWS = ((2.0, 0.6), (4.0, 0.6))
LAWS = ((2.0, 0.5), (2.0, 0.6), (1.0, 0.7))
BLOCK_SIZE = 32
SINK_KEYS = 4
STATISTIC = STATISTICS["mean + var/2"]
# Rows of one step of a forward pass: bounds the memory that scores take.
ROWS = 128


@dataclass(frozen=True)
class Tail:
    """How keys that are not attended enter.

    Attributes:
        block_size: keys per mean.
        exact: the mean over the keys that are not attended; else over the whole page.
        variance: half the variance of the page's keys, channels independent, is added to the mean's score.
    """

    block_size: int
    exact: bool = True
    variance: bool = False

    @property
    def name(self) -> str:
        """In a table."""
        return f"{self.block_size}{' unattended' if self.exact else ' whole'}{' + var/2' if self.variance else ''}"


# For pages a mean over the whole page is the mean over its unattended keys.
TAILS: dict[str, tuple[Tail | None, ...]] = {
    "topk": (
        None,
        Tail(16),
        Tail(32),
        Tail(16, exact=False),
        Tail(32, exact=False),
        Tail(16, variance=True),
        Tail(16, exact=False, variance=True),
    ),
    "pages": (None, Tail(16), Tail(32), Tail(16, variance=True), Tail(32, variance=True)),
}
PERPLEXITY_TAILS: dict[str, tuple[Tail | None, ...]] = {
    "topk": (None, Tail(16), Tail(16, exact=False)),
    "pages": (None, Tail(16), Tail(32)),
}


def topk_keys(measured: Measured, law: tuple[float, float]) -> torch.Tensor:
    """Keys that every query head attends, bool ``[Hkv, G, Q, N]``: its own, the first four, then the highest scores."""
    scores, positions = measured.scores, measured.layer.positions
    position = torch.arange(scores.shape[-1])
    forced = scores.masked_fill((position < SINK_KEYS) & scores.isfinite(), torch.finfo(scores.dtype).max)
    forced = forced.masked_fill(position == positions[:, None], torch.inf)
    budget = torch.tensor([budget_of(p + 1, *law) for p in positions.tolist()])
    largest = int(budget.max())
    index = torch.topk(forced, largest, dim=-1).indices
    within = (torch.arange(largest) < budget[:, None]).expand_as(index)
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, index, within)


def attended_keys(measured: Measured, selection: str, law: tuple[float, float]) -> torch.Tensor:
    """Keys attended, bool ``[Hkv, G, Q, N]``."""
    if selection == "topk":
        return topk_keys(measured, law)
    pages = measured.chosen(measured.logits(STATISTIC), law, "A")
    return pages.repeat_interleave(measured.block_size, -1).expand_as(measured.scores) & measured.scores.isfinite()


def attend(measured: Measured, attended: torch.Tensor, tail: Tail | None) -> torch.Tensor:
    """Output ``[Hkv, G, Q, Dv]`` of the attended keys and the tail."""
    scores, value = measured.scores, measured.value
    if tail is None:
        return torch.softmax(scores.masked_fill(~attended, -torch.inf), -1) @ value
    size = tail.block_size
    count = scores.shape[-1] // size
    complete = torch.arange(count) < measured.layer.positions[:, None] // size
    by_page = scores.unflatten(-1, (count, size))
    outside = ~attended.unflatten(-1, (count, size)) & complete[..., None]
    missing = outside.sum(-1)
    logit = torch.where(outside, by_page, 0.0).sum(-1) / missing if tail.exact else by_page.mean(-1)
    if tail.variance:
        keys = measured.pages.flatten(1, 2).unflatten(1, (count, size))
        with_variance, without = (mean_variance(f)(measured.query, keys, measured.layer.scale) for f in (0.5, 0.0))
        logit = logit + (with_variance - without).view_as(logit)
    logit = logit.masked_fill(missing == 0, -torch.inf)
    peak = torch.maximum(scores.amax(-1), logit.amax(-1))[..., None]
    weight = torch.exp(scores.masked_fill(~attended, -torch.inf) - peak)
    page_weight = torch.exp(logit - peak)
    if tail.exact:
        # A mean of unattended keys is the same as each of them with the mean of their scores.
        weight = weight + (outside * page_weight[..., None]).flatten(-2)
        return (weight @ value) / weight.sum(-1, keepdim=True)
    page_weight = page_weight * missing
    output = weight @ value + page_weight @ value.unflatten(2, (count, size)).mean(3)
    return output / (weight.sum(-1, keepdim=True) + page_weight.sum(-1, keepdim=True))


def output_errors(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """One row for each law, selection and tail: the error's mean over layers and queries."""
    found: dict[tuple[str, tuple[float, float], Tail | None], list[float]] = {}
    for layer in layers:
        measured = Measured(layer, BLOCK_SIZE)
        for selection, tails in TAILS.items():
            for law in ERROR_LAWS:
                attended = attended_keys(measured, selection, law)
                for tail in tails:
                    error = measured.error(attend(measured, attended, tail)).mean()
                    found.setdefault((selection, law, tail), []).append(float(error))
    return [
        row_of(selection, law, tail) | {"output_error": sum(errors) / len(errors), "output_error_by_layer": errors}
        for (selection, law, tail), errors in found.items()
    ]


def row_of(selection: str, law: tuple[float, float], tail: Tail | None) -> dict[str, Any]:
    """The fields that say what a row measures."""
    return {"selection": selection, "alpha": law[0], "C": law[1], "tail": tail.name if tail else "none"}


class SparseForward:
    """An attention function for whole forward passes of one sequence, without padding; set the three fields first."""

    name = "measure_tail"

    def __init__(self) -> None:
        self.selection = "topk"
        self.law = LAWS[0]
        self.tail: Tail | None = None
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``[1, H, L, D]`` in, ``([1, L, Hq, Dv], None)`` out; causal."""
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = query.new_empty(1, length, query.shape[1], value.shape[-1])
        for begin in range(0, length, ROWS):
            end = min(begin + ROWS, length)
            rows = query[0, :, begin:end].unflatten(0, (-1, group))
            layer = Layer(rows, key[0, :, :end], value[0, :, :end], torch.arange(begin, end), scale)
            measured = Measured(layer, BLOCK_SIZE)
            attended = attended_keys(measured, self.selection, self.law)
            output[0, begin:end] = attend(measured, attended, self.tail).flatten(0, 1).transpose(0, 1)
        return output, None


def cross_entropy(model: Any, ids: torch.Tensor, scored: int) -> float:
    """Mean negative log-likelihood, in nats, of the last ``scored`` tokens."""
    with torch.inference_mode():
        logits = model(ids, use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits.float(), ids[0, -scored:]))


def perplexities(
    model: Any, samples: Sequence[torch.Tensor], scored: int, laws: Sequence[tuple[float, float]]
) -> Iterator[dict[str, Any]]:
    """One row for dense attention, then one for each law, selection and tail."""
    dense = [cross_entropy(model, ids, scored) for ids in samples]
    yield {"selection": "dense", "tail": "none", "nats": dense, "perplexity": math.exp(sum(dense) / len(dense))}
    forward = SparseForward()
    model.set_attn_implementation(forward.name)
    for forward.law in laws:
        for forward.selection, tails in PERPLEXITY_TAILS.items():
            for forward.tail in tails:
                nats = [cross_entropy(model, ids, scored) for ids in samples]
                figures = {"nats": nats, "perplexity": math.exp(sum(nats) / len(nats))}
                yield row_of(forward.selection, forward.law, forward.tail) | figures
    model.set_attn_implementation("sdpa")


def show(row: dict[str, Any], figure: str) -> None:
    """Prints a figure of a row."""
    law = f"a={row['alpha']} C={row['C']}" if "alpha" in row else ""
    print(
        f"{row.get('text', '')[-20:]:20} {row['selection']:10} {law:13} {row['tail']:22} {row[figure]:.4f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="+", default=["python-reference"])
    parser.add_argument("--error-length", type=int, default=8000, help="tokens of the pass that output errors are from")
    parser.add_argument("--queries", type=int, default=48, help="evenly spaced in the last fifth of that pass")
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sample of the perplexity")
    parser.add_argument("--samples", type=int, default=2, help="from each text, one after the other")
    parser.add_argument("--scored", type=int, default=1024, help="last tokens of a sample that the perplexity is over")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tail.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    loaded = load_model(arguments.model, "float32", "cpu")
    texts = [load_text(name) for name in arguments.texts]
    begin = time.perf_counter()
    errors: list[dict[str, Any]] = []
    samples: list[torch.Tensor] = []
    for text in texts:
        ids = token_ids(loaded.tokenizer, text, arguments.error_length)
        layers = late_rows(capture(loaded.model, ids, arguments.layers), arguments.queries)
        with torch.inference_mode():
            errors += [{"text": text.name, **row} for row in output_errors(layers)]
        samples += token_ids(loaded.tokenizer, text, arguments.length * arguments.samples).split(arguments.length, 1)
    for row in errors:
        show(row, "output_error")
    rows: list[dict[str, Any]] = []
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "texts": [{"name": text.name, "origin": text.origin, "sha256": text.sha256} for text in texts],
        "block_size": BLOCK_SIZE,
        "output_error": {
            "tokens": arguments.error_length,
            "layers": arguments.layers,
            "queries": arguments.queries,
            "results": errors,
        },
        "perplexity": {
            "tokens": arguments.length,
            "scored": arguments.scored,
            "samples_per_text": arguments.samples,
            "results": rows,
        },
    }
    for row in perplexities(loaded.model, samples, arguments.scored, LAWS):
        rows.append(row)
        show(row, "perplexity")
        record["seconds"] = time.perf_counter() - begin
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
