"""From the rows of a run to comparisons with dense, effective lengths and needed budgets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval_tasks.bootstrap import MIN_SAMPLES
from eval_tasks.comparisons import Comparison, compare, corrected, effective_length
from eval_tasks.iso_quality import IsoQuality, iso_quality
from eval_tasks.methods import DENSE, keys_of, order_of
from eval_tasks.summary import Place, Row, cell_order, documents_of, losses

# Dense attention has to gain so many nats from the first copy, or answer so much right, to be compared with.
GAIN_NEEDED = 0.5
_SCORE_NEEDED = 0.5


@dataclass(frozen=True)
class EffectiveLength:
    """The longest context at which a method stays within the margin of dense.

    Attributes:
        task, method: which.
        length: None when it is outside at the shortest length already.
        longest: the longest length at which both were measured and dense does not fail.
    """

    task: str
    method: str
    length: int | None
    longest: int


def is_answer(rows: Sequence[Row], task: str) -> bool:
    """Whether a task scores generated answers, and not a text."""
    return any("score" in row for row in rows if row["task"] == task)


def margin_of(rows: Sequence[Row], task: str, within: float) -> float:
    """The margin on the loss that ``within`` means: ln(1 + within) nats per token, or a share of the answers."""
    return within if is_answer(rows, task) else math.log1p(within)


def dense_fails(rows: Sequence[Row], task: str, length: int) -> bool:
    """Whether dense attention itself fails at a task and length, so that no method can be judged there."""
    dense = losses(rows, task, length, DENSE)
    if not dense:
        return False
    mean = sum(dense.values()) / len(dense)
    if is_answer(rows, task):
        return mean > 1 - _SCORE_NEEDED
    unseen = losses(rows, "unseen", length, DENSE)
    if task != "recall" or not unseen:
        return False
    return sum(unseen.values()) / len(unseen) - mean < GAIN_NEEDED


def comparisons(rows: Sequence[Row], within: float) -> list[Comparison]:
    """Every method against dense at every task and length, p-values corrected over all of them by Holm's procedure.

    Args:
        rows: of one run.
        within: the margin, as a share: 0.05 is five percent more perplexity, or five answers in a hundred.
    """
    paired = []
    for task, length, method in sorted({(r["task"], int(r["length"]), r["method"]) for r in rows}, key=cell_order):
        values, reference = losses(rows, task, length, method), losses(rows, task, length, DENSE)
        shared = sorted(values.keys() & reference.keys())
        if method != DENSE and shared:
            owners = documents_of(r for r in rows if r["task"] == task)
            pairs = [(values[sample], reference[sample]) for sample in shared]
            documents = [owners[sample] for sample in shared]
            paired.append((task, length, method, pairs, documents, dense_fails(rows, task, length)))
    judged = [len(set(documents)) for *_, documents, fails in paired if not fails]
    family = sum(count >= MIN_SAMPLES for count in judged)
    return corrected(
        [
            compare(
                task,
                length,
                method,
                [a for a, _ in pairs],
                [b for _, b in pairs],
                documents,
                margin_of(rows, task, within),
                is_answer(rows, task),
                fails,
                family,
            )
            for task, length, method, pairs, documents, fails in paired
        ]
    )


def effective_lengths(rows: Sequence[Row], compared: Sequence[Comparison], within: float) -> list[EffectiveLength]:
    """The effective context length of each method on each task, by the means, without lengths where dense fails."""
    found = []
    for task, method in dict.fromkeys((c.task, c.method) for c in compared):
        ratios = {}
        for c in compared:
            if (c.task, c.method) == (task, method) and not c.dense_fails:
                ratios[c.length] = _relative(rows, c)
        if ratios:
            found.append(EffectiveLength(task, method, effective_length(ratios, within), max(ratios)))
    return found


def _relative(rows: Sequence[Row], comparison: Comparison) -> float:
    if not is_answer(rows, comparison.task):
        return math.expm1(comparison.difference)
    dense = losses(rows, comparison.task, comparison.length, DENSE)
    right = 1.0 - sum(dense.values()) / len(dense)
    return comparison.difference / right


def needed_budgets(rows: Sequence[Row], within: float) -> list[IsoQuality]:
    """What each method needs to stay within the margin of dense, from rows of methods with numbers of keys.

    Only documents measured with every length and budget count. Lengths where dense fails are left out, and those that
    are not measured to the end: fewer documents, or fewer budgets, would say less of all others.
    """
    found = []
    failing = {cell for cell in {(r["task"], int(r["length"])) for r in rows} if dense_fails(rows, *cell)}
    named = {(row["task"], keys_of(row["method"])[0]) for row in rows if keys_of(row["method"])[1] is not None}
    for task, method in sorted(named, key=lambda pair: (pair[0], order_of(pair[1]))):
        by_length: dict[int, dict[int, dict[Place, float]]] = {}
        for row in rows:
            base, keys = keys_of(row["method"])
            length = int(row["length"])
            if (row["task"], base) != (task, method) or keys is None or (task, length) in failing:
                continue
            cell = losses([row], task, length, row["method"])
            by_length.setdefault(length, {}).setdefault(keys, {}).update(cell)
        dense = {length: losses(rows, task, length, DENSE) for length in by_length}
        by_length = _finished(by_length, dense)
        cells = [cell for length, budgets in by_length.items() for cell in (dense[length], *budgets.values())]
        shared = sorted(set.intersection(*(set(cell) for cell in cells))) if cells else []
        owners = documents_of(row for row in rows if row["task"] == task)
        differences = {
            length: {k: _by_owner(cell, dense[length], shared, owners) for k, cell in budgets.items()}
            for length, budgets in by_length.items()
        }
        if shared:
            found.append(iso_quality(task, method, differences, margin_of(rows, task, within)))
    return found


def _finished(
    by_length: dict[int, dict[int, dict[Place, float]]], dense: dict[int, dict[Place, float]]
) -> dict[int, dict[int, dict[Place, float]]]:
    """The lengths that have as many documents with every budget as any, and every budget that is below the length."""
    every = {keys for budgets in by_length.values() for keys in budgets}
    whole = {
        length: len(set.intersection(set(dense[length]), *(set(cell) for cell in budgets.values() if cell)))
        for length, budgets in by_length.items()
        if {keys for keys in every if keys < length} <= budgets.keys()
    }
    most = max(whole.values(), default=0)
    # What failed was measured, and holds nothing.
    return {n: {k: cell for k, cell in by_length[n].items() if cell} for n, count in whole.items() if count == most}


def _by_owner(
    cell: dict[Place, float], dense: dict[Place, float], shared: Sequence[Place], owners: dict[Place, str]
) -> list[float]:
    """Mean loss over dense of each document, in the order in which the documents come."""
    gathered: dict[str, list[float]] = {}
    for sample in shared:
        gathered.setdefault(owners[sample], []).append(cell[sample] - dense[sample])
    return [sum(values) / len(values) for values in gathered.values()]
