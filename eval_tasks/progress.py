"""A progress bar whose time left follows from what each method has cost so far, not from a count of steps."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm

# Where attention costs as much as the rest of a small model's layer; only the shape of the forecast hangs on it.
_QUADRATIC_AT = 2048
# Where stderr is no terminal, one line per this many seconds.
_LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Step:
    """What the forecast needs to know of one measurement."""

    method: str
    length: int

    @property
    def cost(self) -> float:
        """Relative cost of a forward pass: linear layers and attention."""
        return self.length * (1 + self.length / _QUADRATIC_AT)


class Forecast:
    """Seconds that steps will take, learned from steps that were taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._cost: dict[str, float] = {}

    def learn(self, step: Step, seconds: float) -> None:
        """Notes what a step took."""
        self._seconds[step.method] = self._seconds.get(step.method, 0.0) + seconds
        self._cost[step.method] = self._cost.get(step.method, 0.0) + step.cost

    def seconds(self, steps: Iterable[Step]) -> float | None:
        """The seconds that ``steps`` will take; None when nothing was learned yet."""
        if not self._cost:
            return None
        overall = sum(self._seconds.values()) / sum(self._cost.values())
        total = 0.0
        for step in steps:
            known = step.method in self._cost
            total += step.cost * (self._seconds[step.method] / self._cost[step.method] if known else overall)
        return total


class Progress:
    """Shows on stderr how far a list of steps is; a bar in a terminal, a line now and then elsewhere.

    Args:
        steps: in the order in which they are begun.
        forecast: what each will take.
        workers: how many processes share the steps.
        shown: whether anything is shown.
    """

    def __init__(self, steps: list[Step], forecast: Forecast, workers: int = 1, shown: bool = True) -> None:
        self._workers = workers
        self._is_shown = shown
        self._left = list(steps)
        self._total = len(steps)
        self._forecast = forecast
        self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=max(sum(step.cost for step in steps), 1.0),
            file=sys.stderr,
            disable=not (shown and self._terminal),
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            leave=False,
        )

    def starts(self, what: str) -> None:
        """Says what is measured now."""
        if not self._is_shown:
            return
        left = self._forecast.seconds(self._left)
        left = None if left is None else left / self._workers
        text = f"{self._total - len(self._left)} of {self._total}, {what}, {duration(left)} left"
        self._bar.set_description_str(text)
        if not self._terminal and time.monotonic() - self._shown >= _LINE_SECONDS:
            self._shown = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def begun_before(self, number: int) -> None:
        """Counts the steps before ``number``, which other processes have taken."""
        while self._total - len(self._left) < number:
            self.finished()

    def finished(self) -> None:
        """Counts the first step that is left."""
        self._bar.update(self._left.pop(0).cost)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def duration(seconds: float | None) -> str:
    """Seconds in words, for example ``"2 min 05 s"``; ``"unknown time"`` for None."""
    if seconds is None:
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
