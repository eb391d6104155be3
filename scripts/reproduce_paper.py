"""Measures the claims of arXiv 2404.02690 and writes docs/results/paper/: synthetic.json, model.json and pictures.

First single query rows over Gaussian keys, up to 2^20 of them, in float64, then the queries, keys and values of a real
model. docs/paper.md says what is claimed, what was found, and by which formulas. The numbers are of the seeds
0, 1, 2 …; nothing else is random.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from frame import Measurement, read

from eval_tasks.figures import to_png
from eval_tasks.models import load_model
from eval_tasks.paper import model, synthetic
from eval_tasks.paper.figures import figures
from eval_tasks.paper.laws import equal_at

# For each part its arguments of ``measure``, and the length at which all laws give 64 keys.
FULL: dict[str, dict[str, Any]] = {
    "synthetic": {"equal_at": 1024, "lengths": [4**i for i in range(4, 11)], "seeds": 32}
    | {"mixed_lengths": [1024, 4096, 16384, 65536], "mixed_keys": 256},
    "model": {"equal_at": 1024, "samples": 3, "layers": [0, 1, 3, 6, 10, 14, 18, 22, 26, 29]}
    | {"lengths": [512, 1024, 2048, 4096, 8192], "mixed_keys": 128, "rows": 8},
}
QUICK: dict[str, dict[str, Any]] = {
    "synthetic": {"equal_at": 256, "lengths": [256, 1024, 4096], "seeds": 4}
    | {"mixed_lengths": [1024, 4096], "mixed_keys": 64},
    "model": {
        "equal_at": 256,
        "samples": 2,
        "layers": [0, 10],
        "lengths": [128, 256, 512],
        "mixed_keys": 32,
        "rows": 4,
    },
}


def measure(part: str, plan: dict[str, Any], name: str, text_name: str) -> dict[str, Any]:
    """The plan of a part and what was found; ``name`` and ``text_name`` are of the model and of what it reads."""
    laws = equal_at(64, plan["equal_at"])
    found: dict[str, Any] = {**plan, "laws": [vars(law) for law in laws]}
    arguments = {key: value for key, value in plan.items() if key != "equal_at"}
    if part == "synthetic":
        return found | synthetic.measure(laws=laws, **arguments)
    loaded, longest = load_model(name, "float32", "cpu"), max(plan["lengths"])
    text, ids = read(loaded, text_name, longest * plan["samples"])
    found |= {"model": name, "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256}}
    arguments["samples"] = ids.split(longest, 1)[: plan["samples"]]
    return found | model.measure(loaded.model, laws=laws, **arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ``arguments`` are those of ``sys.argv`` unless given."""
    parser = Measurement(__doc__, "paper")
    parts = [*FULL, "figures"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="short rows and few of them: seconds instead of minutes")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--threads", type=int, default=2)
    options, _ = parser.start(arguments)
    torch.set_num_threads(options.threads)
    files = {part: options.out / f"{part}.json" for part in FULL}
    for part in [part for part in FULL if part in options.parts]:
        begin = time.perf_counter()
        found = measure(part, (QUICK if options.quick else FULL)[part], options.model, options.text)
        record = parser.record() | {"seconds": time.perf_counter() - begin}
        rounded = json.loads(json.dumps(record | found), parse_float=lambda number: float(f"{float(number):.5g}"))
        lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in rounded.items()]
        files[part].write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{files[part]} after {record['seconds']:.0f} s", flush=True)
    if "figures" in options.parts:
        records = {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.is_file()}
        if not records:
            raise SystemExit(f"{options.out} holds neither synthetic.json nor model.json: measure first")
        for name, figure in figures(records.get("synthetic"), records.get("model")).items():
            (options.out / f"{name}.png").write_bytes(to_png(figure))
            print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
