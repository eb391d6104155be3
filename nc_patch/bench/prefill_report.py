"""What prefill adds to the report: how time grows with length, and the steps of block attention."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from nc_patch.bench.cases import Row, Settings
from nc_patch.bench.prefill_steps import STEPS
from nc_patch.bench.report import fastest_dense, groups, sparse_row


def findings(rows: Sequence[Row], settings: Settings) -> tuple[dict[str, Any], str]:
    """The fitted exponents as an entry of the results, and the exponents and steps in words."""
    fitted = list(exponents(rows, settings.selections))
    lines = [*_said(fitted, settings), *_steps(rows, settings), *_scores(rows)]
    return {"exponents": fitted}, "".join(f"\n{line}" for line in lines)


def exponents(rows: Sequence[Row], selections: Sequence[str]) -> Iterator[Row]:
    """The exponent of n in the time of each method and of each step of block, and in the operations counted."""
    for group, lengths in groups(rows):
        for name in ("dense", *selections):
            found = [
                fastest_dense(rows, group, n) if name == "dense" else sparse_row(rows, group, n, name) for n in lengths
            ]
            timed = [row for row in found if row and "median_seconds" in row]
            yield {
                "geometry": group[0],
                "batch": group[1],
                "method": name,
                "lengths": [row["length"] for row in timed],
                "time": exponent([(row["length"], row["median_seconds"]) for row in timed]),
                "flops": exponent([(row["length"], row["flops"]) for row in timed]),
                "steps": {
                    step: exponent([(r["length"], r["step_seconds"][step]) for r in timed if "step_seconds" in r])
                    for step in (STEPS if name == "block" else ())
                },
            }


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of a straight line through the logarithms of (n, y), by least squares; None for fewer than two n."""
    logs = [(math.log(n), math.log(y)) for n, y in points if y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def _said(fitted: Sequence[Row], settings: Settings) -> Iterator[str]:
    law = f"{1 + settings.C:g}"
    yield f"Exponent of n in the time, by least squares in the logarithms (the law's is 1 + C = {law}, dense 2):"
    for row in fitted:
        said = (
            f"{_number(row['time'])} over {len(row['lengths'])} lengths (counted operations: {_number(row['flops'])})"
        )
        steps = ", ".join(f"{step} {_number(row['steps'][step])}" for step in row["steps"])
        where = f"{row['geometry']}, batch {row['batch']}"
        yield f"  {row['method']:7} {where}: {said}" + (f"; {steps}" if steps else "")


def _steps(rows: Sequence[Row], settings: Settings) -> Iterator[str]:
    of_block = {group: [sparse_row(rows, group, n, "block") for n in lengths] for group, lengths in groups(rows)}
    yield "Steps of block in milliseconds (share of their sum), attend's rate of operations, and the backend:"
    for group, found in of_block.items():
        for row in found:
            if row is None or "step_seconds" not in row:
                continue
            total = sum(row["step_seconds"].values())
            said = [f"{step} {1e3 * t:,.2f} ({100 * t / total:.0f} %)" for step, t in row["step_seconds"].items()]
            dense = fastest_dense(rows, group, row["length"])
            if dense:
                rate = row["step_flops"]["attend"] / max(row["step_seconds"]["attend"], 1e-12)
                said[-1] += f", at {100 * rate / (dense['flops'] / dense['median_seconds']):.0f} % of dense"
            enlarged = f"{100 * row['enlarged']:.0f} % of choices enlarged" if settings.options.get("min_mass") else ""
            backend = row["backend"] + (f", since {row['backend_reason']}" if row["backend_reason"] else "")
            where = f"{group[0]}, batch {group[1]}, {row['length']:9,} keys"
            yield f"  {where}: {'; '.join(filter(None, [', '.join(said), enlarged, backend]))}"


def _scores(rows: Sequence[Row]) -> Iterator[str]:
    yield "Scores of the prompts: mass of the budget's best keys, of 4 sinks and of the last 64 keys; keys of 95 %:"
    for group, lengths in groups(rows):
        drawn = {row["length"]: row["scores"] for row in rows if _group(row) == group and "scores" in row}
        for n in (n for n in lengths if n in drawn):
            masses = ", ".join(f"{drawn[n][name]:.3f}" for name in ("best_keys_mass", "sink_mass", "local_mass"))
            yield f"  {group[0]}, batch {group[1]}, {n:9,} keys: {masses}; {drawn[n]['keys_of_mass']:,.0f}"


def _group(row: Row) -> tuple[str, int]:
    return row["geometry"], row["batch"]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
