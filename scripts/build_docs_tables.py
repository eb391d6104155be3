"""Writes the tables in README.md and in pages of docs, from docs/results/.

python scripts/build_docs_tables.py            writes the pages
python scripts/build_docs_tables.py --check    exits with 1 where a committed page is not what would be written

A table stands between <!-- table: NAME --> and <!-- end --> and is what the function NAME returns.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval_tasks.methods import find_method, order_of
from nc_patch import NCConfig
from nc_patch.config import DEFAULT_DENSE_BELOW

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
DOCS = ("certificates.md", "choosing.md", "decoding.md", "families.md", "prefill.md")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in DOCS))
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
# Rows of docs/families.md, and what the findings of the families in a row match.
_SUPPORTED = {
    "every way of running works": "^prefill yes; decode yes; packed yes$",
    "every way works, and packed sequences stay apart, unlike in the dense model": "packed yes, unlike",
    "linear attention, convolutions and other layers without keys stay as they are": "no attention over keys",
    "cross-attention, or a vision or audio tower, stays dense": "cross-attention|not of the text|VisionAttention",
    "packed sequences mix, as in the dense model": "packed (as dense|in attention)",
    "padded batches differ from single prompts, as in the dense model": "padded batches as dense",
    "a prompt in pieces differs from a whole one, as in the dense model": "pieces as dense",
    "some ways of running raise an error, as in the dense model": "not when dense either",
}
_REFUSED = {
    "its attention does not go through `AttentionInterface`": "the attention of .* does not go through",
    "it is sparse already": "already sparse",
    "its masks do not come from `transformers`' mask functions": "masks through",
    "it makes a mask of its own": "mask of its own",
    "it has no causal attention": "no causal attention",
    "it adds a learned bias to every score": "position_bias",
    "not tested: it needs the package timm": "needs the package timm",
    "not tested: no config of it can be built": "refuses every config",
}


def main(argv: list[str]) -> int:
    """Writes or, with ``--check``, checks the pages; returns the exit code."""
    tables = {table.__name__: table for table in (budgets, prefill, quality, speed, times, decode_cpu, track)}
    tables["peers"] = lambda: quality("question")  # of methods that read a question after a dense prefill
    tables |= {"supported": lambda: families(_SUPPORTED), "refused": lambda: families(_REFUSED)}
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = _TABLE.sub(lambda found: f"{found[1]}{tables[found[2]]()}\n{found[3]}", text)
        if argv != ["--check"]:
            page.write_text(wanted, encoding="utf-8")
        elif wanted != text:
            stale.append(page.name)
    if stale:
        command = "python scripts/build_docs_tables.py"
        print(f"{', '.join(stale)}: tables are not those of docs/results; run: {command}", file=sys.stderr)
    return 1 if stale else 0


def budgets() -> str:
    """Keys of some laws at some lengths."""
    lengths, laws = (1024, 4096, 16384, 131072), ((2.0, 0.5), (12.0, 0.5), (4.0, 0.6), (2.0, 0.7))
    rows = []
    for alpha, C in laws:
        keys = [NCConfig(alpha, C, dense_below=0).budget(n) for n in lengths]
        shares = [f"{k:,} ({_percent(k / n)})" for k, n in zip(keys, lengths, strict=True)]
        rows.append([f"{alpha:g}·n^{C:g}", *shares])
    return _markdown(["keys of", *(f"{n:,}" for n in lengths)], rows)


def prefill() -> str:
    """Perplexity and recall over dense, and keys, by setting and length, over the samples that dense has too."""
    rows = pd.DataFrame(_read("prefill.json")["rows"])
    rows = rows[rows.length > DEFAULT_DENSE_BELOW]
    dense = rows[rows.settings == "dense"].drop(columns=["settings", "attended"])
    rows = rows[rows.settings != "dense"].merge(dense, on=[name for name in dense if name != "nats"])
    cells = {}
    for (name, length, task), found in rows.groupby(["settings", "length", "task"]):
        excess = found.nats_x - found.nats_y  # of this setting, and of dense attention
        cells[name, length, task] = f"{np.exp(excess.mean()):.3f} ({np.exp(excess.max()):.3f})"
        cells[name, length, "keys"] = _percent(found.attended.mean())
    columns = [(n, what) for n in sorted(rows.length.unique()) for what in ("perplexity", "recall", "keys")]
    lines = [
        [f"**{name}**" if name == "default" else name, *(cells.get((name, *column), "") for column in columns)]
        for name in rows.settings.unique()
    ]
    return _markdown(["", *(f"{n:,}: {what}" for n, what in columns)], lines)


def quality(run: str = "prefill") -> str:
    """Perplexity and recall perplexity of each method over dense attention's at the longest length, and keys read."""
    table = pd.read_csv(RESULTS / "readme" / run / "summary.csv")
    longest = table.length.max()
    table = table[(table.length == longest) & (table.task != "unseen")].pivot(index="method", columns="task")
    rows = []
    for name in sorted(table.index, key=order_of):
        found = table.loc[name]
        cells = [_ratio(found["perplexity_ratio", task]) for task in ("perplexity", "recall")]
        if name == "dense":
            cells = [f"1 ({found['perplexity', task]:.2f})" for task in ("perplexity", "recall")]
        rows.append([find_method(name).title, *cells, _percent(found["tail_attended_fraction", "perplexity"])])
    return _markdown([f"{longest:,} tokens", "perplexity", "recall perplexity", "keys read"], rows)


def speed() -> str:
    """Time of the default on a CPU as a share of dense attention's, of prompts and of steps of decoding."""
    record = _read("cpu.json")
    rows = []
    for part, size in (("prompts", "a prompt of {:,} tokens"), ("steps", "a token after {:,}")):
        for tokens, found in record[part].items():
            in_bfloat16 = record["bfloat16"][part][tokens]
            times = (f"{each['default']['over_dense']:.2f}" for each in (found, in_bfloat16))
            rows.append([size.format(int(tokens)), *times])
    return _markdown(["time over the unpatched model's", "float32", "bfloat16"], rows)


def times() -> str:
    """Time of a real model on a CPU as a share of dense attention's: a step of decoding, and prompts."""
    record = _read("cpu.json")
    prompts = {f"a prompt of {int(tokens):,}": found for tokens, found in record["prompts"].items()}
    steps = {f"a token after {int(tokens):,}": found for tokens, found in record["steps"].items()}
    return _over_dense("time over dense", steps | prompts, list(next(iter(prompts.values()))))


def decode_cpu() -> str:
    """Time of decoding as an operator on a CPU, as a share of the fastest dense attention's."""
    found = {f"{int(keys):,}": found for keys, found in _read("cpu.json")["operator"].items()}
    return _over_dense("keys", found, list(next(iter(found.values()))))


def track() -> str:
    """Time of a real model on a CPU with ``track=True``, as a share of that without."""
    found = _read("cpu.json")["track"]
    rows = [[f"`{name}`", *(f"{found[phase][name]:.2f}" for phase in found)] for name in found["prompt"]]
    return _markdown(["", *found], rows)


def families(rows: dict[str, str]) -> str:
    """Model types by what was found of them; one stands in every row that it matches."""
    found: dict[str, str] = {}
    for family in _read("families.json")["families"]:
        ways = [f"{way} {family[way]}" for way in ("prefill", "decode", "packed") if family[way]]
        findings = [family["refused"], family["not_built"], *ways, *family["dense"]]
        found[family["name"]] = "; ".join(filter(None, findings))
    known = "|".join((_SUPPORTED | _REFUSED).values())
    if unseen := [name for name, said in found.items() if not re.search(known, said)]:
        raise ValueError(f"no row of docs/families.md holds {', '.join(unseen)}")
    cells = []
    for row, pattern in rows.items():
        names = [name.partition(" ")[0] for name, said in found.items() if re.search(pattern, said)]
        cells.append([row, ", ".join(dict.fromkeys(names))])
    return _markdown(["finding", "model types"], cells)


def _over_dense(title: str, sizes: dict[str, dict[str, Any]], names: list[str]) -> str:
    """A row for each size, and a column for each method but the first, with which they are compared."""
    ratio = lambda found, name: f"{found[name]['over_dense']:.2f}" if name in found else ""  # noqa: E731
    return _markdown([title, *names[1:]], [[size, *(ratio(f, n) for n in names[1:])] for size, f in sizes.items()])


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 1.1 else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
