"""``nc-patch fidelity``: what sparse attention keeps of dense attention's rows, by layer, head and position.

Every layer gets the queries, keys and values of a dense forward pass, so that one layer's error does not reach the
next: figures say where a method loses, not what a model loses by it.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from eval_tasks import arguments as options
from eval_tasks.capture import attend_rows, receive
from eval_tasks.errors import EvalError
from eval_tasks.figures import Figure, Line, Panel, draw, style_of, to_png
from eval_tasks.methods import DEFAULT_METHODS, DENSE, Budgets, attention_by, find_method, order_of
from eval_tasks.models import attention_of
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.store import check_out, write_atomically
from eval_tasks.summary import csv_of
from eval_tasks.tasks import Layout, ascending, places, tokenise
from eval_tasks.texts import PYTHON_REFERENCE, load_text
from nc_patch import AttentionResult, NCConfig
from nc_patch.ops.problem import Problem
from nc_patch.selections import Dense

RESULTS, TABLE, PICTURE = "fidelity.json", "fidelity.csv", "fidelity.png"
# The queries that are measured at each length: the last ones, a whole block of queries for every selection.
ROWS = 64


def run_fidelity(argv: Sequence[str]) -> int:
    """Measures, and writes ``fidelity.json``, ``fidelity.csv`` and ``fidelity.png``."""
    arguments = _parser().parse_args(argv)
    out = arguments.out
    check_out(out, (RESULTS, TABLE, PICTURE))
    record = {"command": shlex.join(["nc-patch", "fidelity", *argv])} | _measure(arguments)
    layers = by_layer(record["rows"])
    write_atomically(out / RESULTS, (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / TABLE, csv_of(layers).encode())
    write_atomically(out / PICTURE, to_png(figure(layers)))
    table = layers.pivot_table(["kept_mass", "output_error"], "method", "length", sort=False)
    print(table.rename(index=lambda name: find_method(name).title).to_string(float_format="%.3f"))
    print(f"\nWritten: {', '.join(str(out / name) for name in (RESULTS, TABLE, PICTURE))}")
    return 0


def configs_of(methods: Sequence[str], budgets: Budgets, lengths: Sequence[int]) -> dict[tuple[str, int], NCConfig]:
    """The settings of each method at each length; raises EvalError for what has no attention of this package."""
    found: dict[tuple[str, int], NCConfig] = {}
    for name, length in itertools.product(methods, lengths):
        config = attention_by(name, budgets, length)
        if not isinstance(config, NCConfig):
            said = f"{name} is no sparse attention of this package"
            raise EvalError(f"{said}: fidelity compares those with dense attention")
        found[name, length] = config
    return found


def fidelity(
    model: Any, ids: torch.Tensor, configs: Mapping[tuple[str, int], NCConfig], sample: int = 0
) -> Iterator[dict[str, Any]]:
    """Compares methods with dense attention on what the layers of a model receive; means over ``ROWS`` last queries.

    One forward pass over ``ids``, int64 ``[1, L]``, serves all lengths, of which L is the longest; ``configs`` are of
    ``configs_of``, and ``sample`` is a number for the results.

    Yields a row for each layer, method and length: ``kept_mass``, the dense softmax weight of the attended keys, and
    ``output_error``, ‖o − o_dense‖ / ‖o_dense‖, of each query head; ``attended_fraction`` of the visible keys.
    """
    layers, lengths = range(model.config.get_text_config().num_hidden_layers), {length for _, length in configs}
    for layer, problem in zip(layers, receive(model, ids, layers), strict=True):
        dense = {length: _attend(problem, length, NCConfig(1.0, 1.0)).output.float() for length in lengths}
        for (name, length), config in configs.items():
            result, reference = _attend(problem, length, config), dense[length]
            assert result.kept_mass is not None
            assert result.attended is not None
            error = (result.output.float() - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-12)
            start, end = problem.visible[0, length - ROWS : length].unbind(-1)
            yield {
                "method": name,
                "length": length,
                "sample": sample,
                "layer": layer,
                "kept_mass": result.kept_mass.mean((0, 2)).tolist(),
                "output_error": error.mean((0, 2)).tolist(),
                "attended_fraction": float((result.attended.float().mean((0, 1)) / (end - start)).mean()),
            }


def by_layer(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Means over samples and heads, and the error of the worst head, by method, length and layer."""
    which, figures = ["method", "length", "layer"], ["output_error", "kept_mass", "attended_fraction"]
    heads = pd.DataFrame(rows).explode(figures[:2]).astype(dict.fromkeys(figures, float))
    heads["head"] = heads.groupby(level=0).cumcount()
    layers = heads.groupby([*which, "head"], sort=False)[figures].mean().groupby(which, sort=False)
    return layers.mean().assign(worst_head_error=layers["output_error"].max()).reset_index()


def figure(layers: pd.DataFrame) -> Figure:
    """Output error by layer at the longest length; the bars reach to the worst heads."""
    longest, lines = layers.length.max(), []
    for name, own in layers[layers.length == longest].set_index("layer").groupby("method", sort=False):
        worst = {"yerr": (0 * own.output_error, own.worst_head_error - own.output_error), "elinewidth": 0.6}
        lines.append(Line(find_method(name).title, own.output_error, style_of(name) | worst))
    title = f"output error at {longest:,} keys, up to the worst head"
    return draw([Panel(title, lines, x_label="layer", by_length=False)])


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of ``fidelity``, and what they were measured on."""
    lengths, methods = ascending(arguments.lengths), sorted(set(arguments.methods), key=order_of)
    configs = configs_of(methods, Budgets(arguments.alpha, arguments.C, arguments.equal_at), lengths)
    if lengths[0] < ROWS:
        raise EvalError(f"--lengths must be at least {ROWS}, as many queries as are compared, got {lengths[0]}")
    loaded, source = options.load_chosen_model(arguments), load_text(arguments.text)
    text, model = tokenise(loaded.tokenizer, source.content), loaded.model
    rows: list[dict[str, Any]] = []
    for sample, start in enumerate(places(text, Layout((max(lengths),), arguments.samples, 1, 1, arguments.seed))):
        ids = torch.from_numpy(text.ids[start : start + max(lengths)])[None].to(model.device)
        rows += fidelity(model, ids, configs, sample)
        print(f"sample {sample + 1} of {arguments.samples}", file=sys.stderr)
    machine = hardware(model.device, torch.get_num_threads())
    record: dict[str, Any] = {"commit": commit(), "versions": versions(), "hardware": machine, "queries": ROWS}
    record |= {"model": arguments.model, "attention": attention_of(model)}
    return record | {"text": {"name": source.name, "origin": source.origin, "sha256": source.sha256}, "rows": rows}


def _attend(problem: Problem, length: int, config: NCConfig) -> AttentionResult:
    """Attention of the last ``ROWS`` of the first ``length`` queries, over the first ``length`` keys."""
    rows = torch.arange(length - ROWS, length)
    budget = config.row_budgets(problem.visible[:, rows].contiguous(), length)
    selection = Dense() if config.is_dense() else config.prefill
    return attend_rows(problem, rows, length, budget, selection, config.backend)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nc-patch fidelity", allow_abbrev=False, description=__doc__)
    add, sparse = parser.add_argument, [name for name in DEFAULT_METHODS if name != DENSE]
    options.add_out(parser, f"directory for {RESULTS}, {TABLE} and {PICTURE}")
    options.add_model_options(parser)
    add("--text", default=PYTHON_REFERENCE, help=f"{options.TEXT_FORMS} (default)")
    add("--methods", nargs="+", default=sparse, metavar="METHOD", help=f"default: {' '.join(sparse)}")
    options.add_lengths(parser, (512, 1024, 2048), "keys that a query sees")
    add("--samples", type=options.positive, default=2, help="stretches of text (default: 2)")
    add("--seed", type=options.not_negative, default=0, help="of the choice of stretches (default: 0)")
    options.add_budget_options(parser)
    return parser
