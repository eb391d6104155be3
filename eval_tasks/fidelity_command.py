"""``nc-patch fidelity``: the command line of ``eval_tasks.fidelity``, and its table and picture."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from eval_tasks.arguments import TEXT_FORMS, add_budget_options, add_lengths, add_model_options, load_chosen_model
from eval_tasks.errors import EvalError
from eval_tasks.fidelity import ROWS, Fidelity, fidelity
from eval_tasks.figures import to_png
from eval_tasks.matching import Budgets
from eval_tasks.methods import DEFAULT_METHODS, DENSE, find_method, order_of
from eval_tasks.models import attention_of
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.store import check_out, write_atomically
from eval_tasks.summary import csv_of
from eval_tasks.tasks import Layout, ascending, places, tokenise
from eval_tasks.texts import PYTHON_REFERENCE, load_text
from nc_patch.cli import USAGE_ERROR

RESULTS, TABLE, PICTURE = "fidelity.json", "fidelity.csv", "fidelity.png"


def run_fidelity(argv: Sequence[str]) -> int:
    """Measures, writes ``fidelity.json``, ``fidelity.csv`` and ``fidelity.png``, and returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        rows = _measure(arguments)
    except (EvalError, ValueError) as error:
        print(f"nc-patch: {error}", file=sys.stderr)
        return USAGE_ERROR
    print(table(rows))
    print(f"\nWritten: {', '.join(str(arguments.out / name) for name in (RESULTS, TABLE, PICTURE))}")
    return 0


def _measure(arguments: argparse.Namespace) -> list[Fidelity]:
    out: Path = arguments.out
    check_out(out, (RESULTS, TABLE, PICTURE))
    lengths = ascending(arguments.lengths)
    budgets = Budgets(arguments.alpha, arguments.C, arguments.equal_at, arguments.block_size)
    methods = sorted(set(arguments.methods), key=order_of)
    for name in methods:
        find_method(name)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    loaded = load_chosen_model(arguments)
    source = load_text(arguments.text)
    text = tokenise(loaded.tokenizer, source.content)
    starts = places(text, Layout((max(lengths),), arguments.samples, 1, 1, arguments.seed))
    rows: list[Fidelity] = []
    for sample, start in enumerate(starts):
        ids = torch.from_numpy(text.ids[start : start + max(lengths)])[None].to(loaded.model.device)
        rows.extend(fidelity(loaded.model, ids, methods, budgets, lengths, sample))
        print(f"sample {sample + 1} of {len(starts)}", file=sys.stderr)
    record: dict[str, Any] = {
        "command": shlex.join(["nc-patch", "fidelity", *sys.argv[2:]]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(loaded.model.device, torch.get_num_threads()),
        "model": arguments.model,
        "attention": attention_of(loaded.model),
        "text": {"name": source.name, "origin": source.origin, "sha256": source.sha256},
        "queries": ROWS,
        "rows": [row.to_dict() for row in rows],
    }
    write_atomically(out / RESULTS, (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / TABLE, to_csv(rows).encode())
    write_atomically(out / PICTURE, to_png(figure(rows)))
    return rows


def to_csv(rows: Sequence[Fidelity]) -> str:
    """Means over samples and heads, and the worst head, by method, length and layer."""
    names = ["method", "length", "layer", "kept_mass", "output_error", "worst_head_error", "attended_fraction"]
    lines = []
    for method, length, layer in dict.fromkeys((row.method, row.length, row.layer) for row in rows):
        own = [r for r in rows if (r.method, r.length, r.layer) == (method, length, layer)]
        by_head = [fmean(errors) for errors in zip(*(row.output_error for row in own), strict=True)]
        kept = fmean(fmean(row.kept_mass) for row in own)
        attended = fmean(row.attended_fraction for row in own)
        lines.append([method, length, layer, kept, fmean(by_head), max(by_head), attended])
    return csv_of(names, lines)


def table(rows: Sequence[Fidelity]) -> str:
    """Kept mass and output error of each method by length, as text."""
    lengths = sorted({row.length for row in rows})
    lines = [f"{'kept mass / output error':26}" + "".join(f"{length:>18,}" for length in lengths)]
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for length in lengths:
            own = [row for row in rows if (row.method, row.length) == (method, length)]
            kept, error = (fmean(fmean(getattr(row, name)) for row in own) for name in ("kept_mass", "output_error"))
            cells.append(f"{kept:9.3f} / {error:.3f}")
        lines.append(f"{find_method(method).title:26}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def figure(rows: Sequence[Fidelity]) -> Figure:
    """Output error by length, and by layer at the longest length; the shaded band reaches to the worst head."""
    longest = max(row.length for row in rows)
    picture = Figure(figsize=(10, 4), layout="constrained")
    by_length, by_layer = picture.subplots(1, 2)
    for place, method in enumerate(dict.fromkeys(row.method for row in rows)):
        colour = f"C{place}"
        own = [row for row in rows if row.method == method]
        lengths = sorted({row.length for row in own})
        means = [fmean(fmean(row.output_error) for row in own if row.length == length) for length in lengths]
        by_length.plot(lengths, means, marker="o", color=colour, label=find_method(method).title)
        layers = sorted({row.layer for row in own})
        at = {layer: [r.output_error for r in own if (r.layer, r.length) == (layer, longest)] for layer in layers}
        by_head = {layer: [fmean(errors) for errors in zip(*found, strict=True)] for layer, found in at.items()}
        by_layer.plot(layers, [fmean(by_head[layer]) for layer in layers], color=colour)
        by_layer.fill_between(
            layers, [fmean(by_head[layer]) for layer in layers], [max(by_head[layer]) for layer in layers],
            color=colour, alpha=0.12, linewidth=0,
        )  # fmt: skip
    by_length.set(
        xscale="log", xlabel="keys that a query sees", ylabel="output error", title="mean over layers and heads"
    )
    by_length.set_xticks(sorted({row.length for row in rows}), [f"{n:,}" for n in sorted({row.length for row in rows})])
    by_length.minorticks_off()
    by_layer.set(xlabel="layer", title=f"at {longest:,} keys; the band reaches to the worst head")
    for axis in (by_length, by_layer):
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    picture.legend(loc="outside lower center", ncols=4, frameon=False)
    return picture


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nc-patch fidelity",
        allow_abbrev=False,
        description="Compare the attention of each layer and head with dense attention on the same inputs: kept mass "
        "and output error, by position.",
    )
    add = parser.add_argument
    sparse = [name for name in DEFAULT_METHODS if name != DENSE]
    add("--out", type=Path, required=True, metavar="DIR", help=f"directory for {RESULTS}, {TABLE} and {PICTURE}")
    add_model_options(parser)
    add("--text", default=PYTHON_REFERENCE, help=f"{TEXT_FORMS} (default)")
    add("--methods", nargs="+", default=sparse, metavar="METHOD", help=f"default: {' '.join(sparse)}")
    add_lengths(parser, (512, 1024, 2048), "keys that a query sees")
    add("--samples", type=int, default=2, help="stretches of text (default: 2)")
    add("--seed", type=int, default=0, help="of the choice of stretches (default: 0)")
    add_budget_options(parser)
    return parser
