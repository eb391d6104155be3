"""What was measured, in words: a table, where sparse is slower, and from which length on it is faster."""

import math
from collections.abc import Iterator, Sequence

from nc_patch.bench.benchmark import Wording
from nc_patch.bench.cases import ABSENT, FAILED, LEFT_OUT, OK, WRONG, Row

Group = tuple[str, int]


def groups(rows: Sequence[Row]) -> Iterator[tuple[Group, list[int]]]:
    """Each (geometry, batch) that was timed, with its lengths in order."""
    for group in dict.fromkeys((row["geometry"], row["batch"]) for row in rows):
        yield group, sorted({row["length"] for row in rows if _group(row) == group})


def fastest_dense(rows: Sequence[Row], group: Group, length: int) -> Row | None:
    """The row of the fastest dense implementation of a case, or None where none ran."""
    ran = [row for row in rows if _group(row) == group and row["length"] == length and row["kind"] == "dense"]
    return min((row for row in ran if "median_seconds" in row), key=lambda row: row["median_seconds"], default=None)


def sparse_row(rows: Sequence[Row], group: Group, length: int, selection: str) -> Row | None:
    """The row of a selection in a case, or None where the case did not run."""
    return next(
        (row for row in rows if _group(row) == group and row["length"] == length and row["method"] == selection), None
    )


def crossovers(rows: Sequence[Row], selections: Sequence[str]) -> list[Row]:
    """From which length on each selection is faster than the fastest dense, per geometry and batch.

    ``length`` is interpolated in the logarithms between the longest measured length at which it is not faster and the
    next one; None where it is not faster at the longest, or faster already at the shortest (``says`` tells which).
    """
    found = []
    for group, lengths in groups(rows):
        for selection in selections:
            ratios = []
            for length in lengths:
                dense, sparse = fastest_dense(rows, group, length), sparse_row(rows, group, length, selection)
                if dense and sparse and "median_seconds" in sparse:
                    ratios.append((length, sparse["median_seconds"] / dense["median_seconds"]))
            crossing, says = _crossing(ratios)
            known = {"geometry": group[0], "batch": group[1], "selection": selection}
            found.append({**known, "length": crossing, "says": says})
    return found


def table(rows: Sequence[Row], selections: Sequence[str], law: str, wording: Wording) -> str:
    """The times of all cases; in brackets, the speed over the fastest dense, and the share of the ceiling."""
    lines: list[str] = []
    for group, lengths in groups(rows):
        lines += ["", f"{group[0]}, batch {group[1]}, budget {law}: {wording.unit}"]
        heads = "".join(f"{name:>25}" for name in selections)
        lines.append(f"{'keys':>9} {'budget':>7}{heads} {'dense':>18}  fastest dense")
        for length in lengths:
            dense = fastest_dense(rows, group, length)
            cells, budget = "", ""
            for name in selections:
                row = sparse_row(rows, group, length, name)
                cells += f"{_cell(row, dense, wording):>25}"
                budget = f"{row['budget']:,}" if row else budget
            if dense:
                lines.append(f"{length:9,} {budget:>7}{cells} {_cell(dense, None, wording):>18}  {dense['method']}")
            else:
                lines.append(f"{length:9,} {budget:>7}{cells} {'none':>18}  {_why_none(rows, group, length)}")
    return "\n".join(lines)


def findings(rows: Sequence[Row], selections: Sequence[str], wording: Wording) -> str:
    """Crossovers, the cases in which sparse is slower, kept masses, and everything that did not run."""
    lines = [f"(speed over the fastest dense, share of {wording.ceiling})", *([wording.notes] if wording.notes else [])]
    lines += ["", "Faster than the fastest dense:"]
    for cross in crossovers(rows, selections):
        lines.append(f"  {cross['selection']:7} {cross['geometry']}, batch {cross['batch']}: {cross['says']}")
    slower = []
    for group, lengths in groups(rows):
        for name in selections:
            at = [f"{length:,}" for length in lengths if _is_slower(rows, group, length, name)]
            if at:
                slower.append(f"  {name:7} {group[0]}, batch {group[1]}: at {', '.join(at)} keys")
    lines += ["Slower than it:", *(slower or ["  nowhere"])]
    lines += ["Kept mass (share of the dense softmax that is attended), mean over the heads of a sequence:"]
    for group, lengths in groups(rows):
        for name in selections:
            kept = [(length, sparse_row(rows, group, length, name)) for length in lengths]
            said = [f"{row['kept_mass']:.3f} at {n:,}" for n, row in kept if row and row.get("kept_mass") is not None]
            if said:
                lines.append(f"  {name:7} {group[0]}, batch {group[1]}: {', '.join(said)}")
    missing = list(dict.fromkeys(_problem(row) for row in rows if row["status"] != OK or row.get("captured") is False))
    return "\n".join([*lines, *(["Did not run, or not as meant:", *missing] if missing else [])])


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows in which sparse attention failed or was wrong."""
    return [row for row in rows if row["kind"] != "dense" and row["status"] in (FAILED, WRONG)]


def _crossing(ratios: Sequence[tuple[int, float]]) -> tuple[int | None, str]:
    if not ratios:
        return None, "not measured"
    last = max((i for i, (_, ratio) in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return None, f"at every length measured, from {ratios[0][0]:,} keys on"
    if last == len(ratios) - 1:
        return None, f"not up to {ratios[last][0]:,} keys, where it takes {ratios[last][1]:.2f} times as long"
    (n, slower), (m, faster) = ratios[last], ratios[last + 1]
    part = math.log(slower) / (math.log(slower) - math.log(faster))
    length = round(n * (m / n) ** part)
    return length, f"from about {length:,} keys on (measured: not at {n:,}, {1 / faster:.2f} times at {m:,})"


def _is_slower(rows: Sequence[Row], group: Group, length: int, name: str) -> bool:
    dense, row = fastest_dense(rows, group, length), sparse_row(rows, group, length, name)
    return bool(dense and row and row.get("median_seconds", 0.0) > dense["median_seconds"])


def _cell(row: Row | None, dense: Row | None, wording: Wording) -> str:
    if row is None or "median_seconds" not in row:
        return "-" if row is None else row["status"]
    time = f"{wording.per_second * row['median_seconds']:,.1f}" + ("*" if row.get("captured") is False else "")
    speed = f"{dense['median_seconds'] / row['median_seconds']:.2f}x, " if dense else ""
    return f"{time} ({speed}{100 * row['roofline_fraction']:.0f} %)"


def _why_none(rows: Sequence[Row], group: Group, length: int) -> str:
    whole = [row for row in rows if _group(row) == group and row["length"] == length and row["kind"] == "case"]
    return f"{whole[0]['status']}: {whole[0]['message']}" if whole else "no dense implementation ran"


def _problem(row: Row) -> str:
    if row["status"] == ABSENT:
        return f"  {row['method']}: {row['message']}"
    if row["status"] == LEFT_OUT:
        return f"  {row['method']} ({row['geometry']}, batch {row['batch']}): left out beyond: {row['message']}"
    where = f"{row['geometry']}, batch {row['batch']}, {row['length']:,} keys"
    what = "not captured in a CUDA graph (*)" if row["status"] == OK else row["status"]
    return f"  {row['method']} ({where}): {what}: {row['message']}"


def _group(row: Row) -> Group:
    return row["geometry"], row["batch"]
