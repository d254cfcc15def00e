"""Where claims, tables and sentences look numbers up: by experiment, cell, row and quantity.

In: what was measured, and `Frames.runs` for the facts of a cell. Out: `Board`. Next: claims.py, tables.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from adafuse.report.measurements import CellName, Measured, Measurement, RowName
from adafuse.report.rules import Difference, Number

# quantities that are paired differences of accuracies
DIFFERENCES = ("minus", "rest", "later")


class Place(NamedTuple):
    """One cell of one experiment."""

    experiment: str
    cell: str


@dataclass
class Board:
    """All measurements, indexed. `runs` has a row a record (`Frames.runs`), or none where facts are not asked for."""

    measured: Measured
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        self._values: dict[Place, dict[str, dict[str, Measurement]]] = {}
        for value in self.measured.values:
            rows = self._values.setdefault(Place(value.experiment, value.cell), {})
            rows.setdefault(value.row, {})[value.quantity] = value
        self._cells = {Place(cell.experiment, cell.cell): cell for cell in self.measured.cells}
        self._rows: dict[Place, dict[str, RowName]] = {}
        for row in self.measured.rows:
            self._rows.setdefault(Place(row.experiment, row.cell), {})[row.row] = row
        self._behind: dict[Place, frozenset[str]] = {}
        self._facts: dict[Place, dict[str, Any]] = {}
        self._tasks = dict(self.runs.get("task", {}))

    def places(self, experiments: Iterable[str] | None = None) -> list[Place]:
        """The cells of these experiments (None: of all), a GPU's first; of those that share all records one stands."""
        names = (
            dict.fromkeys(place.experiment for place in self._cells) if experiments is None else experiments
        )
        wanted = {name: index for index, name in enumerate(names)}
        own = [place for place in self._cells if place.experiment in wanted]
        # sorting is stable: within an experiment cells stay in their order
        own.sort(key=lambda place: (self._cells[place].is_cpu, wanted[place.experiment]))
        return list({(place.cell, self.behind(place)): place for place in reversed(own)}.values())[::-1]

    def name(self, place: Place) -> CellName:
        """What a cell is called."""
        return self._cells[place]

    def rows(self, place: Place) -> list[str]:
        """The rows of a cell in the order of a table: the named ones, then the others as they come."""
        named = self._rows.get(place, {})
        return [*named, *(row for row in self._values.get(place, {}) if row not in named)]

    def row(self, place: Place, row: str) -> RowName:
        """What a row is called, and what it is."""
        return self._rows.get(place, {}).get(row) or RowName(*place, row, row)

    def of_row(self, place: Place, row: str) -> dict[str, Measurement]:
        """All quantities of a row."""
        return self._values.get(place, {}).get(row, {})

    def find(self, place: Place, row: str, quantity: str) -> Measurement | None:
        """One measurement, with or without a value."""
        return self.of_row(place, row).get(quantity)

    def value(self, place: Place, row: str, quantity: str) -> float | None:
        """The bare value, if there is one."""
        found = self.find(place, row, quantity)
        return None if found is None or math.isnan(found.value) else found.value

    def number(self, place: Place, row: str, quantity: str) -> Number | None:
        """A value with its interval; a paired difference of accuracies with its test."""
        found = self.find(place, row, quantity)
        if found is None or math.isnan(found.value):
            return None
        own = (found.value, found.low, found.high, found.n or 0, found.reason)
        if quantity.partition(".")[0] not in DIFFERENCES:
            return Number(*own)
        key = quantity.removeprefix("minus.")
        none = Measurement(*place, row, quantity)
        tested, p, spread = (
            self.find(place, row, f"{name}.{key}") or none for name in ("minus90", "p", "spread")
        )
        return Difference(*own, tested.low, tested.high, p.value, spread.value)

    def reason(self, place: Place, row: str, quantity: str) -> str:
        """Why there is no value."""
        found = self.find(place, row, quantity)
        return "not measured" if found is None else found.reason

    def resolved(self, place: Place, row: str, ratio: float) -> bool:
        """False if a ratio is no further from 1 than the A/A arm of its runtime may be; True without such an arm."""
        resolution = self.value(place, self.row(place, row).runtime, "resolution")
        return resolution is None or abs(math.log(ratio)) > math.log1p(resolution)

    def records(self, place: Place, rows: Iterable[str], quantities: Iterable[str]) -> tuple[str, ...]:
        """The records behind some numbers, each once."""
        names = list(quantities)
        found = [self.find(place, row, name) for row in rows for name in names]
        return tuple(dict.fromkeys(record for one in found if one for record in one.records))

    def behind(self, place: Place) -> frozenset[str]:
        """Every record behind a cell."""
        if place not in self._behind:
            rows = self._values.get(place, {}).values()
            self._behind[place] = frozenset(r for own in rows for one in own.values() for r in one.records)
        return self._behind[place]

    def facts(self, place: Place) -> dict[str, Any]:
        """The settings of a cell: those of the first of its records, a timed one if there is one; empty if unknown."""
        if place not in self._facts:
            known = sorted(self.behind(place) & self._tasks.keys())
            timed = [record for record in known if self._tasks[record] != "memory"]
            first = (timed or known)[:1]
            self._facts[place] = {
                str(name): self.runs.at[record, name] for record in first for name in self.runs
            }
        return self._facts[place]
