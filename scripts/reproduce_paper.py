"""Measures the claims of arXiv 2404.02690 and writes docs/results/paper/: synthetic.json, model.json and pictures.

First single query rows over Gaussian keys, up to 2^20 of them, in float64, then the queries, keys and values of a real
model. docs/paper.md says what is claimed, what was found, and by which formulas. The numbers are of the seeds
0, 1, 2 …; nothing else is random.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval_tasks.capture import token_ids
from eval_tasks.figures import to_png
from eval_tasks.models import load_model
from eval_tasks.paper import mixed, model, synthetic
from eval_tasks.paper.figures import mixed_figure, model_figures, synthetic_figures
from eval_tasks.paper.laws import equal_at
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch.common import check_directory

PARTS = ("synthetic", "model", "figures")
DIGITS = 5  # significant, of what is written


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        lengths, seeds: of the Gaussian rows.
        mixed_lengths, mixed_keys: contexts of the comparison at equal mean cost, and that cost.
        model_lengths, model_mixed_keys, samples, layers, rows: the same for the model; samples of the text follow one
            another.
        keys, length: at which all laws of the other comparisons are equal.
    """

    lengths: tuple[int, ...]
    seeds: int
    mixed_lengths: tuple[int, ...]
    mixed_keys: int
    model_lengths: tuple[int, ...]
    model_mixed_keys: int
    samples: int
    layers: tuple[int, ...]
    rows: int
    keys: int = 64
    length: int = 1024


FULL = Plan(
    lengths=tuple(4**i for i in range(4, 11)),
    seeds=32,
    mixed_lengths=(1024, 4096, 16384, 65536),
    mixed_keys=256,
    model_lengths=(512, 1024, 2048, 4096, 8192),
    model_mixed_keys=128,
    samples=3,
    layers=(0, 1, 3, 6, 10, 14, 18, 22, 26, 29),
    rows=model.ROWS,
)
QUICK = Plan(
    lengths=(256, 1024, 4096),
    seeds=4,
    mixed_lengths=(1024, 4096),
    mixed_keys=64,
    model_lengths=(128, 256, 512),
    model_mixed_keys=32,
    samples=2,
    layers=(0, 10),
    rows=4,
    length=256,
)


def measure_synthetic(plan: Plan) -> dict[str, Any]:
    """Errors, supports and exponents of Gaussian rows, and the comparison at equal mean cost."""
    laws = equal_at(plan.keys, plan.length)
    of_mean = mixed.laws_of_mean(plan.mixed_keys, plan.mixed_lengths)
    found = synthetic.measure(plan.lengths, range(plan.seeds), laws, of_mean)
    places = [plan.lengths.index(n) for n in plan.mixed_lengths]
    compared = {
        spread: _compared(of_mean, plan.mixed_lengths, {law: _pick(x, places) for law, x in by_law.items()})
        for spread, by_law in found.pop("rows").items()
    }
    library = [
        {"n": n, "law": law.name, "sigma": sigma} | synthetic.library_difference(n, 0, sigma, law)
        for n in plan.lengths
        for law in laws
        for sigma in (2.0, 4.0)
    ]
    for name in ("kept_mass", *synthetic.VALUES):
        print(f"largest difference of nc_patch.sparse_attention, {name}: {max(row[name] for row in library):.2g}")
    return {
        "lengths": plan.lengths,
        "seeds": plan.seeds,
        "channels": synthetic.CHANNELS,
        "laws": [vars(law) for law in laws],
        **found,
        "mixed": {"lengths": plan.mixed_lengths, "keys": plan.mixed_keys, "rows": compared},
        "library_differences": library,
    }


def measure_model(plan: Plan, name: str, text_name: str) -> dict[str, Any]:
    """Counts, errors and the comparison at equal mean cost on a model."""
    loaded, text = load_model(name, "float32", "cpu"), load_text(text_name)
    longest = max(plan.model_lengths)
    samples = token_ids(loaded.tokenizer, text, longest * plan.samples).split(longest, 1)
    laws = equal_at(plan.keys, plan.length)
    of_mean = mixed.laws_of_mean(plan.model_mixed_keys, plan.model_lengths)
    found = model.measure(loaded.model, samples, plan.layers, plan.model_lengths, laws, of_mean, plan.rows)
    compared = _compared(of_mean, plan.model_lengths, found.pop("rows"), found.pop("documents"))
    return {
        "model": name,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256},
        "samples": plan.samples,
        "layers": plan.layers,
        "lengths": plan.model_lengths,
        "rows": plan.rows,
        "laws": [vars(law) for law in laws],
        **found,
        "mixed": {"lengths": plan.model_lengths, "keys": plan.model_mixed_keys, "rows": compared},
    }


def _compared(
    laws: Sequence[Any],
    lengths: Sequence[int],
    by_law: dict[str, dict[str, np.ndarray]],
    documents: Sequence[int] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Name of a loss → the comparison of laws by it; the kept mass counts as the dropped mass."""
    names = next(iter(by_law.values()))
    losses = {
        "dropped_mass" if name == "kept_mass" else name: {
            law: 1 - x[name] if name == "kept_mass" else x[name] for law, x in by_law.items()
        }
        for name in names
    }
    return {name: mixed.compare(laws, lengths, by_name, documents) for name, by_name in losses.items()}


def _pick(measures: dict[str, np.ndarray], places: Sequence[int]) -> dict[str, np.ndarray]:
    return {name: x[list(places)] for name, x in measures.items()}


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record: numbers rounded, a line for each row of a list of rows."""
    text = json.dumps(_rounded(record), indent=1, ensure_ascii=False)
    # What a row holds is joined onto its line.
    lines: list[str] = []
    for line in text.split("\n"):
        depth, content = len(line) - len(line.lstrip()), line.strip()
        if depth > 2 or (depth == 2 and content[0] in "]}"):
            lines[-1] += content if lines[-1][-1] in "[{" or content[0] in "]}" else f" {content}"
        else:
            lines.append(line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(x) for x in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ``arguments`` are those of ``sys.argv`` unless given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="short rows and few of them: seconds instead of minutes")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/paper"))
    options = parser.parse_args(arguments)
    check_directory(options.out)
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else FULL
    measured = {
        "synthetic": lambda: measure_synthetic(plan),
        "model": lambda: measure_model(plan, options.model, options.text),
    }
    for part in [part for part in PARTS if part in options.parts and part in measured]:
        begin = time.perf_counter()
        found = measured[part]()
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "versions": versions() | {"numpy": np.__version__},
            "hardware": hardware(torch.device("cpu"), options.threads),
            "seconds": time.perf_counter() - begin,
        }
        write(options.out / f"{part}.json", record | found)
        print(f"{options.out / part}.json after {record['seconds']:.0f} s", flush=True)
    if "figures" in options.parts:
        draw(options.out)


def draw(directory: Path) -> None:
    """Draws the pictures of the records that ``directory`` holds."""
    records = {
        name: json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        for name in PARTS
        if (directory / f"{name}.json").is_file()
    }
    if not records:
        raise SystemExit(f"{directory} holds neither synthetic.json nor model.json: measure first")
    figures = synthetic_figures(records["synthetic"]) if "synthetic" in records else {}
    if "model" in records:
        figures |= model_figures(records["model"])
    if len(records) == 2:
        figures["mixed"] = mixed_figure(records["synthetic"], records["model"])
    for name, figure in figures.items():
        (directory / f"{name}.png").write_bytes(to_png(figure))
        print(directory / f"{name}.png")


if __name__ == "__main__":
    main()
