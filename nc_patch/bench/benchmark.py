"""What sets one benchmark apart from another, for the command, the report and the plot that they share."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nc_patch.bench.cases import Measure, Row, Settings


@dataclass(frozen=True)
class Wording:
    """How times are said.

    Attributes:
        unit: what a number of the table is, such as "microseconds a step and layer". per_second: how many are a second.
        ceiling: what a share of 1 would be, such as "the bandwidth of a copy at which the counted bytes were moved".
        counts: the same for a plot, such as "bytes at the bandwidth of a copy".
        notes: what else a reader of the table must know; may be empty.
    """

    unit: str
    per_second: float
    ceiling: str
    counts: str
    notes: str = ""


@dataclass(frozen=True)
class Whole:
    """The measurement of a whole model that goes with that of the operator.

    Attributes:
        name: of its option and its entry in the results, such as "generate". help: of the option.
        measure: rows for context lengths until a deadline of ``time.monotonic``. table: the rows in words.
    """

    name: str
    help: str
    measure: Callable[[Settings, tuple[int, ...], float], Iterator[Row]]
    table: Callable[[list[Row]], str]


@dataclass(frozen=True)
class Benchmark:
    """One subcommand of ``nc-patch bench``.

    Attributes:
        name: of the subcommand and of its files. summary: one line for the help. what: what a time is, in the results.
        lengths_are: what the lengths count. selections: those measured by default, in this order.
        defaults: by device type, what is measured where the arguments do not say: lengths, geometry, dtype, repeats,
            the whole model's lengths under its name, and ``ceiling_size``.
        wording: how times are said.
        ceiling_name: the entry of the results with what the machine reaches. ceiling: measures it, from the device, the
            dtype and ``ceiling_size``. ceiling_in_words: says it.
        measure: makes the rows of a case. growth: see ``measure_all``.
        whole: the measurement of a whole model.
        add_options: adds arguments that only this benchmark has. options: of selections by name, from the parsed
            arguments.
        findings: more entries of the results from all rows, and what is printed of them.
    """

    name: str
    summary: str
    what: str
    lengths_are: str
    selections: tuple[str, ...]
    defaults: dict[str, dict[str, Any]]
    wording: Wording
    ceiling_name: str
    ceiling: Callable[[torch.device, torch.dtype, int], float]
    ceiling_in_words: Callable[[float], str]
    measure: Measure
    growth: float
    whole: Whole
    add_options: Callable[[argparse.ArgumentParser], None]
    options: Callable[[argparse.Namespace], dict[str, Any]]
    findings: Callable[[Sequence[Row], Settings], tuple[dict[str, Any], str]] = field(default=lambda *_: ({}, ""))

    @property
    def file(self) -> str:
        """The name of the results."""
        return f"{self.name}.json"

    @property
    def plot(self) -> str:
        """The name of the plot."""
        return f"{self.name}.png"
