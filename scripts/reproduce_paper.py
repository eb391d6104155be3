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
from pathlib import Path
from typing import Any

import torch

from eval_tasks.capture import token_ids
from eval_tasks.figures import to_png
from eval_tasks.models import load_model
from eval_tasks.paper import model, synthetic
from eval_tasks.paper.figures import figures
from eval_tasks.paper.laws import equal_at
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch.common import check_directory

PARTS = ("synthetic", "model", "figures")
# Gaussian rows, and what is compared at equal mean cost; samples of the text follow one another.
GAUSSIAN = {
    "lengths": [4**i for i in range(4, 11)],
    "seeds": 32,
    "mixed_lengths": [1024, 4096, 16384, 65536],
    "mixed_keys": 256,
}
QUICK_GAUSSIAN = {"lengths": [256, 1024, 4096], "seeds": 4, "mixed_lengths": [1024, 4096], "mixed_keys": 64}
MODEL = {
    "samples": 3,
    "layers": [0, 1, 3, 6, 10, 14, 18, 22, 26, 29],
    "lengths": [512, 1024, 2048, 4096, 8192],
    "mixed_keys": 128,
    "rows": 8,
}
QUICK_MODEL = {"samples": 2, "layers": [0, 10], "lengths": [128, 256, 512], "mixed_keys": 32, "rows": 4}


def measure_synthetic(quick: bool) -> dict[str, Any]:
    """Errors, supports and exponents of Gaussian rows, the comparison at equal mean cost, and the library's error."""
    plan: dict[str, Any] = QUICK_GAUSSIAN if quick else GAUSSIAN
    laws = equal_at(64, 256 if quick else 1024)
    found = synthetic.measure(laws=laws, **plan)
    library = [
        {"n": n, "law": law.name, "sigma": sigma} | synthetic.library_difference(n, 0, sigma, law)
        for n in plan["lengths"]
        for law in laws
        for sigma in (2.0, 4.0)
    ]
    shared = {"lengths": plan["lengths"], "seeds": plan["seeds"], "channels": synthetic.CHANNELS}
    return {**shared, "laws": [vars(law) for law in laws], **found, "library_differences": library}


def measure_model(quick: bool, name: str, text_name: str) -> dict[str, Any]:
    """Counts, errors and the comparison at equal mean cost on a model."""
    plan: dict[str, Any] = QUICK_MODEL if quick else MODEL
    loaded, text = load_model(name, "float32", "cpu"), load_text(text_name)
    longest, laws = max(plan["lengths"]), equal_at(64, 256 if quick else 1024)
    samples = token_ids(loaded.tokenizer, text, longest * plan["samples"]).split(longest, 1)
    found = model.measure(loaded.model, laws=laws, **{**plan, "samples": samples})
    source = {"name": text.name, "origin": text.origin, "sha256": text.sha256}
    shared = {"model": name, "text": source, **{key: plan[key] for key in ("samples", "layers", "lengths", "rows")}}
    return {**shared, "laws": [vars(law) for law in laws], **found}


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record: numbers to 5 digits, a line for each row of a list of rows."""
    record = json.loads(json.dumps(record), parse_float=lambda number: float(f"{float(number):.5g}"))
    lines = []
    for name, value in record.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) if rows else json.dumps(value)
        lines.append(f' "{name}": ' + (f"[\n  {text}\n ]" if rows else text))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


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
    measures = {
        "synthetic": lambda: measure_synthetic(options.quick),
        "model": lambda: measure_model(options.quick, options.model, options.text),
    }
    for part in [part for part in measures if part in options.parts]:
        begin = time.perf_counter()
        found = measures[part]()
        record = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "versions": versions()}
        record |= {"hardware": hardware(torch.device("cpu"), options.threads), "seconds": time.perf_counter() - begin}
        write(options.out / f"{part}.json", record | found)
        print(f"{options.out / part}.json after {record['seconds']:.0f} s", flush=True)
    if "figures" in options.parts:
        files = {name: options.out / f"{name}.json" for name in measures}
        records = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
        if not records:
            raise SystemExit(f"{options.out} holds neither synthetic.json nor model.json: measure first")
        for name, figure in figures(records.get("synthetic"), records.get("model")).items():
            (options.out / f"{name}.png").write_bytes(to_png(figure))
            print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
