"""Writes the tables of figures in docs/choosing.md and docs/limits.md, from the files under docs/results/.

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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "docs" / "choosing.md", ROOT / "docs" / "limits.md")
COMMAND = "python scripts/build_docs_tables.py"
LAWS = ((1.0, 0.5), (2.0, 0.5), (2.0, 0.6), (4.0, 0.6), (2.0, 0.7))
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


def defaults() -> str:
    """Perplexity and recall perplexity over dense by setting and length, over the samples that dense has too."""
    record = json.loads((RESULTS / "defaults.json").read_text(encoding="utf-8"))
    found = {(r["settings"], r["task"], r["length"], r["sample"]): r for r in record["rows"]}
    columns = sorted({(task, length) for _, task, length, _ in found}, key=lambda column: (column[0], column[1]))
    lengths_of = [{length for who, _, length, _ in found if who == name} for name in record["settings"]]
    common = min(set.intersection(*lengths_of))
    rows = []
    for name in record["settings"]:
        cells, shares = [], []
        for task, length in columns:
            samples = [s for s in range(99) if {(name, task, length, s), ("dense", task, length, s)} <= found.keys()]
            own, dense = ([found[who, task, length, s] for s in samples] for who in (name, "dense"))
            shares += [row["attended_fraction"] for row in own if length == common]
            cells.append(_cell([r["nats"] for r in own], [r["nats"] for r in dense]))
        if any(cells) and name != "dense":
            rows.append([_setting(record["settings"][name]), _percent(statistics.fmean(shares)), *cells])
    titles = {"perplexity": "perplexity", "recall": "recall perplexity"}
    header = [f"{titles[task]} at {length:,}" for task, length in columns]
    return _markdown(["", f"keys at {common:,}", *header], rows)


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
    """Time on a CPU as a share of dense attention's: a token of decoding, and a prefill."""
    decode = json.loads((RESULTS / "decode_cpu.json").read_text(encoding="utf-8"))
    forward = json.loads((RESULTS / "forward_cpu.json").read_text(encoding="utf-8"))
    prefill = json.loads((RESULTS / "prefill_cpu.json").read_text(encoding="utf-8"))
    rows = [
        [f"`{row['method']}`, a token after {int(decode['settings']['context']):,}", f"{row['median_over_dense']:.2f}"]
        for row in decode["results"]
        if row["method"] != "dense"
    ]
    rows += [
        [f"`{row['method']}`, {row['tokens']:,} tokens at once", f"{row['median_over_dense']:.2f}"]
        for row in forward["results"]
        if row["method"] != "dense"
    ]
    speedup = prefill["whole_forward"]["speedup"]
    rows += [
        [f"`{n}`, {prefill['tokens']:,} tokens at once", f"{1 / s:.2f}"] for n, s in speedup.items() if n != "dense"
    ]
    return _markdown(["", "time over dense"], rows)


TABLES: dict[str, Callable[[], str]] = {"budgets": budgets, "defaults": defaults, "laws": laws, "times": times}


def _cell(nats: list[float], dense: list[float]) -> str:
    """The ratio of perplexities; says so where there was one sample only."""
    if not nats:
        return ""
    ratio = math.exp(statistics.fmean(nats) - statistics.fmean(dense))
    return (f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}") + (" (one sample)" if len(nats) == 1 else "")


def _setting(options: dict[str, object] | None) -> str:
    options = dict(options or {})
    law = f"{options.pop('alpha'):g}·n^{options.pop('C'):g}"
    named = [f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in options.items()]
    return f"{law}, `{', '.join(named)}`" if named else law


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    sys.exit(main())
