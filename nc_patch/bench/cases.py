"""What every benchmark goes through: its settings, its cases one after another, and a row for all that came of them."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nc_patch.bench.dense_rivals import KINDS, Absent
from nc_patch.bench.timing import FEWEST, Prepared, first_line, interleave
from nc_patch.config import NCConfig

Row = dict[str, Any]
OK, ABSENT, FAILED, WRONG, NO_MEMORY, NO_TIME = "ok", "absent", "error", "wrong", "out of memory", "out of time"
# Was too slow at a shorter length to be of interest at a longer one.
LEFT_OUT = "left out"
# A method is left out where a run would take more than so many seconds and it takes so many times the fastest dense's.
# Dense ones grow alike, so that hardly one overtakes another.
_TOO_SLOW = {"sparse": ((1.0, 2.0), (5.0, 1.2)), "dense": ((1.0, 1.1),)}


@dataclass(frozen=True)
class Settings:
    """What is timed, on what; ``options`` are those of selections, by name, as ``NCConfig`` takes them."""

    device: torch.device
    dtype: torch.dtype
    geometries: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    selections: tuple[str, ...]
    alpha: float
    C: float
    repeats: int
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dense: tuple[str, ...] = KINDS

    @property
    def law(self) -> str:
        """The budget's law in words."""
        return f"{self.alpha:g} n^{self.C:g}"

    def config(self, prefill: str, decode: str | None = None) -> NCConfig:
        """The settings of attention by a selection, or by one for each phase."""
        phases = {"prefill": prefill, "decode": decode or prefill}
        return NCConfig(self.alpha, self.C, **phases, **{"dense_below": 0, **self.options})


@dataclass(frozen=True)
class Case:
    """One geometry, batch and length."""

    geometry: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.geometry}, batch {self.batch}, {self.length:,} keys"


# The rows of a case, from the settings, the machine's ceiling, all rows before it and the deadline of time.monotonic.
Measure = Callable[[Case, Settings, float, Sequence[Row], float], list[Row]]


def cases(settings: Settings) -> list[Case]:
    """All cases, short ones first within each geometry and batch."""
    return [
        Case(geometry, batch, length)
        for geometry in settings.geometries
        for batch in settings.batches
        for length in sorted(settings.lengths)
    ]


def measure_all(
    measure: Measure, growth: float, settings: Settings, ceiling: float, deadline: float, say: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of one case after another; a case that fails is a row that says why, and the next goes on.

    Args:
        measure: makes the rows of a case. growth: exponent of the length with which times grow; a case that cannot end
            in time by that, from the times at the length before it, does not begin. 0 for no such rule.
        ceiling: what the machine reaches, in units of the counts, a second.
        deadline: of ``time.monotonic``, after which no case begins.
        say: told of each case that begins.
    """
    before: list[Row] = []
    for case in cases(settings):
        rows: list[Row]
        left = deadline - time.monotonic()
        if left < 0:
            yield [new_row(case, "all", "case", NO_TIME, message="the time was used up before this case")]
            continue
        at_least = _least_seconds(case, before, growth) if growth else 0.0
        if at_least > left:
            message = f"takes {at_least:,.0f} s or more, and {left:,.0f} s are left"
            yield [new_row(case, "all", "case", NO_TIME, message=message)]
            continue
        say(str(case))
        try:
            with torch.inference_mode():
                rows = measure(case, settings, ceiling, before, deadline)
        except Exception as error:
            rows = [new_row(case, "all", "case")]
            fail(rows[0], error)
        before += rows
        yield rows
        gc.collect()  # what failed may hold inputs in its traceback
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)  # raises where an earlier failure has taken the device along
            torch.cuda.empty_cache()


def is_wanted(row: Row, before: Sequence[Row], deadline: float, growth: float, always: bool = False) -> bool:
    """Whether a method is worth the time that it takes, by what it took at shorter lengths; if not, its row says why.

    Args:
        row: of the method, as from ``new_row``. before: the rows of shorter lengths.
        deadline: of ``time.monotonic``, after which no method is. growth: see ``measure_all``.
        always: whatever it takes, if there is time.
    """
    if time.monotonic() > deadline:
        row |= {"status": NO_TIME, "message": "the time was used up before this method"}
        return False
    same = [one for one in before if _group(one) == _group(row)]
    earlier = max((one for one in same if one["method"] == row["method"]), key=lambda one: one["length"], default=None)
    if always or earlier is None:
        return True
    message = None
    if earlier["status"] == LEFT_OUT:
        message = earlier["message"]
    elif earlier["status"] == NO_MEMORY:
        message = f"no memory at {earlier['length']:,} keys"
    elif "median_seconds" in earlier:
        dense = [one for one in same if one["kind"] == "dense" and one["length"] == earlier["length"]]
        fastest = min((one["median_seconds"] for one in dense if "median_seconds" in one), default=None)
        if fastest is not None and _is_too_slow(earlier["median_seconds"], fastest, row, earlier, growth):
            times = earlier["median_seconds"] / fastest
            message = f"took {times:.1f} times as long as the fastest dense at {earlier['length']:,} keys"
    if message is not None:
        row |= {"status": LEFT_OUT, "message": message}
    return message is None


def _is_too_slow(seconds: float, fastest: float, row: Row, earlier: Row, growth: float) -> bool:
    longer = seconds * (row["length"] / earlier["length"]) ** growth
    return any(longer > cost and seconds > times * fastest for cost, times in _TOO_SLOW[row["kind"]])


def _least_seconds(case: Case, before: Sequence[Row], growth: float) -> float:
    """What a check and the fewest repeats of the methods that are wanted take, from the longest length so far."""
    timed = [row for row in before if _group(row) == (case.geometry, case.batch) and "median_seconds" in row]
    longest = max((row["length"] for row in timed), default=case.length)
    of_each = sum(
        row["median_seconds"]
        for row in timed
        if row["length"] == longest
        and is_wanted(new_row(case, row["method"], row["kind"]), before, math.inf, growth, row["method"] == "block")
    )
    return (1 + FEWEST) * of_each * (case.length / longest) ** growth


def _group(row: Row) -> tuple[str, int]:
    return row["geometry"], row["batch"]


def time_rows(
    rows: dict[str, Row], ready: dict[str, Prepared], count: str, settings: Settings, ceiling: float, deadline: float
) -> None:
    """Times what is ready and writes it into the rows.

    Args:
        rows: by method. count: the entry of a row with what it counts, such as bytes.
        ceiling: how many of that the machine reaches a second. deadline: see ``interleave``.
    """
    taken, raised = interleave(ready, settings.repeats, settings.device, deadline)
    for name, error in raised.items():
        fail(rows[name], error)
    for name, seconds in taken.items():
        rows[name] |= {"seconds": seconds, "median_seconds": median(seconds)}
        rows[name]["roofline_fraction"] = rows[name][count] / ceiling / rows[name]["median_seconds"]


def new_row(case: Case, method: str, kind: str, status: str = OK, **more: Any) -> Row:
    """A row of a method, of kind ``"sparse"`` or ``"dense"``, or of a whole case, ``"case"``."""
    known = {"geometry": case.geometry, "batch": case.batch, "length": case.length}
    return {**known, "method": method, "kind": kind, "status": status, **more}


def fail(row: Row, error: Exception) -> None:
    """Writes into a row that its method is absent, or short of memory, or broke."""
    if isinstance(error, Absent):
        row |= {"status": ABSENT, "message": str(error)}
        return
    short_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    row |= {"status": NO_MEMORY if short_of_memory else FAILED, "message": first_line(error)}


def judge(row: Row, comparison: dict[str, Any]) -> bool:
    """Writes what ``checks.compare`` found into a row; whether it was right."""
    row |= comparison
    if not row["right"]:
        row |= {"status": WRONG, "message": f"off by {row['relative_error']:.2g} from the {row['compared_with']}"}
    return bool(row["right"])


def median(seconds: Sequence[float]) -> float:
    """The median of some times."""
    return float(torch.tensor(seconds, dtype=torch.float64).quantile(0.5))
