"""Which records agree in all but one knob.

In: evaluate records. Out: a `Why` for each set of records, grouped by configuration alone: a record may stand in
several. Next: why.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafuse.records import Record
from adafuse.report.accuracy import Seeds, as_trained, by_seed, is_pilot, tasks_of, trained
from adafuse.report.cells import Cell, base_key, cells, method_name
from adafuse.report.knobs import GATE_INPUTS, KNOBS, METHOD, Knob
from adafuse.report.variants import as_its_file, overridden, rank, setting, variants


@dataclass(frozen=True)
class Why:
    """One knob over which records differ: for each line (a method), the records by value and by seed; and the
    `levels` of methods that have no such knob.
    """

    knob: Knob
    lines: dict[str, dict[Any, Seeds]]
    values: tuple[Any, ...]
    default: Any
    tasks: list[str]
    levels: dict[str, Seeds]

    @property
    def records(self) -> list[Record]:
        return [record for value in self.values for record in self.at(value)]

    @property
    def cell(self) -> Cell:
        """The records at the default, by which a study is called."""
        return Cell(tuple(self.at(self.default)))

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What else a line's method has set otherwise than its file, by line."""
        own = {entry for group, entry in self.knob.entries if group == METHOD}
        first = {
            name: next(iter(next(iter(points.values())).values()))[0] for name, points in self.lines.items()
        }
        found = {name: overridden(record) for name, record in first.items()}
        return {name: {k: v for k, v in changed.items() if k not in own} for name, changed in found.items()}

    def at(self, value: Any) -> list[Record]:
        """Every line's records at one value."""
        found = [points.get(value, {}) for points in self.lines.values()]
        return [record for seeds in found for records in seeds.values() for record in records]


def why_studies(records: Iterable[Record]) -> list[Why]:
    """Every study of every knob, knob by knob, GPUs first."""
    known = as_trained(records)
    return [study for knob in KNOBS for study in _studies(knob, known)]


def _studies(knob: Knob, records: list[Record]) -> list[Why]:
    groups: dict[str, dict[Path, Record]] = {}
    for cell in cells(records, "evaluate"):
        for record in cell.records:
            # by path: the backbone's record stands in every cell that it belongs to
            groups.setdefault(_rest(knob, record), {})[record.path] = record
    found = [_study(knob, list(group.values()), records) for group in groups.values()]
    return [study for study in found if study]


def _study(knob: Knob, group: list[Record], records: list[Record]) -> Why | None:
    by_setting: dict[str, list[Record]] = {}
    for record in group:
        by_setting.setdefault(json.dumps(_fixed(knob, record), sort_keys=True), []).append(record)
    varied = [own for own in by_setting.values() if len(_values(knob, own)) > 1]
    if not varied:
        return None
    kept = [record for own in varied for record in own]
    points = {_name(own, kept): _points(knob, own) for own in varied}
    lines = {name: points[name] for name in sorted(points, key=rank)}
    finished = [record for record in kept if record.status != "unfinished"]
    values = tuple(sorted(_values(knob, kept), key=_order))
    default = _default(knob, values, kept[0], records)
    return Why(knob, lines, values, default, tasks_of(finished), _levels(knob, group, kept))


def _points(knob: Knob, records: list[Record]) -> dict[Any, Seeds]:
    """The records of one line by value."""
    return {v: by_seed(r for r in records if _value(knob, r) == v) for v in _values(knob, records)}


def _name(own: list[Record], kept: list[Record]) -> str:
    """As the tables call it where the knob is at its most common value."""
    names = {r.path: name for name, records in variants(kept).items() for r in records}
    return min((names[record.path] for record in own), key=lambda name: (len(name), name))


def _levels(knob: Knob, group: list[Record], kept: list[Record]) -> dict[str, Seeds]:
    """Methods of the same cell that have no such knob."""
    varied = {method_name(record) for record in kept}
    beside = [r for r in group if knob.beside and method_name(r) not in varied and as_its_file(r)]
    return {name: by_seed(records) for name, records in variants(beside).items()}


def _values(knob: Knob, records: list[Record]) -> set[Any]:
    return {_value(knob, record) for record in records}


def _value(knob: Knob, record: Record) -> Any:
    return knob.value(record.run["config"])


def _default(knob: Knob, values: tuple[Any, ...], of: Record, records: list[Record]) -> Any:
    """The value that most records of this machine and backbone share; the first of several."""
    near = [r for r in trained(records) if _place(r) == _place(of)]
    count = Counter(_value(knob, record) for record in near)
    return max(values, key=lambda value: count[value])


def _place(record: Record) -> tuple[Any, Any]:
    return record.run["machine"].get("gpu"), record.run["config"].get("model")


def _rest(knob: Knob, record: Record) -> str:
    """What two records must agree in to stand in one study, whatever their methods."""
    same = json.loads(base_key(Cell((record,))))
    for group, name in knob.entries:
        if group != METHOD and same.get(group):
            same[group] = {k: v for k, v in same[group].items() if k != name}
    return json.dumps([same, is_pilot(record)], sort_keys=True)


def _fixed(knob: Knob, record: Record) -> dict[str, Any]:
    own = {name for group, name in knob.entries if group == METHOD}
    return {k: v for k, v in setting(record).items() if k not in own}


def _order(value: Any) -> tuple[int, Any]:
    """No value first, then by size; where gates look, from the first layer on."""
    if value is None:
        return 0, 0
    return 1, GATE_INPUTS.index(value) if value in GATE_INPUTS else value
