"""Writes the tables of figures in docs/choosing.md, limits.md and prefill.md, from the files under docs/results/.

python scripts/build_docs_tables.py            writes the pages
python scripts/build_docs_tables.py --check    exits with 1 where a committed page is not what would be written

A table stands between <!-- table: NAME --> and <!-- end --> and is called NAME in TABLES.
"""

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from nc_patch import NCConfig
from nc_patch.config import DEFAULT_DENSE_BELOW

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = tuple(ROOT / "docs" / name for name in ("choosing.md", "decoding.md", "limits.md", "prefill.md"))
COMMAND = "python scripts/build_docs_tables.py"
LAWS = ((2.0, 0.5), (12.0, 0.5), (4.0, 0.6), (2.0, 0.7))
LENGTHS = (1024, 4096, 16384, 131072)
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    check = parser.parse_args(argv).check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)
        if wanted != text and check:
            stale.append(page.name)
        elif wanted != text:
            page.write_text(wanted, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: tables are not those of docs/results; run: {COMMAND}", file=sys.stderr)
    return 1 if stale else 0


def budgets() -> str:
    """Keys of some laws at some lengths."""
    rows = []
    for alpha, C in LAWS:
        keys = [NCConfig(alpha, C, dense_below=0).budget(n) for n in LENGTHS]
        shares = [f"{k:,} ({_percent(k / n)})" for k, n in zip(keys, LENGTHS, strict=True)]
        rows.append([f"{alpha:g}·n^{C:g}", *shares])
    return _markdown(["keys of", *(f"{n:,}" for n in LENGTHS)], rows)


def prefill() -> str:
    """Perplexity and recall over dense, and keys, by setting and length, over the samples that dense has too."""
    record = json.loads((RESULTS / "prefill.json").read_text(encoding="utf-8"))
    found = {(r["settings"], r["task"], r["length"], r["text"], r["stretch"]): r for r in record["rows"]}
    lengths = sorted({length for _, _, length, *_ in found if length > DEFAULT_DENSE_BELOW})
    rows = []
    for name in record["settings"]:
        cells = []
        for length in lengths:
            shares: list[float] = []
            for task in ("perplexity", "recall"):
                samples = [key[3:] for key in found if key[:3] == (name, task, length)]
                own, dense = ([found[(who, task, length, *at)] for at in samples] for who in (name, "dense"))
                cells.append(_ratios([a["nats"] - b["nats"] for a, b in zip(own, dense, strict=True)]))
                shares = [row["attended"] for row in own] or shares
            cells.append(_percent(statistics.fmean(shares)) if shares else "")
        if any(cells) and name != "dense":
            rows.append([f"**{name}**" if name == "default" else name, *cells])
    what = ("perplexity", "recall", "keys")
    return _markdown(["", *(f"{length:,}: {each}" for length in lengths for each in what)], rows)


def laws() -> str:
    """What each method of the quickstart loses at the longest length, budgets being equal at 1,024 tokens."""
    with (RESULTS / "quickstart" / "summary.csv").open(encoding="utf-8") as lines:
        found = {(r["task"], int(r["length"]), r["method"]): r for r in csv.DictReader(lines)}
    longest = max(length for _, length, _ in found)
    rows = []
    for method in dict.fromkeys(method for task, _, method in found if task == "recall"):
        text, recall = (found.get((task, longest, method)) for task in ("perplexity", "recall"))
        if text is not None and recall is not None:
            read = [f"{float(text['tail_mean_keys']):.0f}", _percent(float(text["tail_attended_fraction"]))]
            rows.append([f"`{method}`", *read, *(f"{float(row['perplexity']):.3g}" for row in (text, recall))])
    return _markdown([f"{longest:,} tokens", "keys", "share", "perplexity", "recall perplexity"], rows)


def times() -> str:
    """Time of a real model on a CPU as a share of dense attention's: a step of decoding, and prompts."""
    record = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))
    parts = [("a token after", tokens, found) for tokens, found in record["steps"].items()]
    parts += [("a prompt of", tokens, found) for tokens, found in record["prompts"].items()]
    names = [name for name in next(iter(record["prompts"].values())) if name != "dense"]
    cell = lambda found, name: f"{found[name]['over_dense']:.2f}" if name in found else ""  # noqa: E731
    rows = [[f"{what} {int(tokens):,}", *(cell(found, name) for name in names)] for what, tokens, found in parts]
    return _markdown(["time over dense", *names], rows)


def decode_cpu() -> str:
    """Time of decoding as an operator on a CPU, as a share of the fastest dense attention's."""
    record = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))["operator"]
    names = [name for name in next(iter(record.values())) if name != "dense, a group as rows"]
    rows = [
        [f"{int(keys):,}", *(f"{found[name]['over_dense']:.2f}" for name in names)] for keys, found in record.items()
    ]
    return _markdown(["keys", *names], rows)


TABLES: dict[str, Callable[[], str]] = {
    "budgets": budgets,
    "prefill": prefill,
    "laws": laws,
    "times": times,
    "decode_cpu": decode_cpu,
}


def _ratios(nats: list[float]) -> str:
    """What losses over dense come to as a ratio of perplexities, and that of the worst sample."""
    if not nats:
        return ""
    mean, worst = (math.exp(value) for value in (statistics.fmean(nats), max(nats)))
    return f"{mean:.3f} ({worst:.3f})" if mean < 10 else f"{mean:.1f} ({worst:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    sys.exit(main())
