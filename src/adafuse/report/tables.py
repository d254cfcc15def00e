"""Tables by one mechanism: results/tables.yaml says which rows, which columns, and how they are printed.

In: `Cell`s and the specification; its head says what its words mean. Out: the same with the `sections` of
each table, for templates. Next: page.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from adafuse.report import formats
from adafuse.report.claims import Cell, Json, agrees, of
from adafuse.report.formats import GAP
from adafuse.report.rules import Number


class Line(NamedTuple):
    """What stands in each column; the cell and row that it is about, and the records behind it."""

    texts: dict[str, str]
    at: tuple[object, ...] = ()
    records: tuple[str, ...] = ()


class Section(NamedTuple):
    """One part of a table, all of whose lines have the same columns."""

    heading: str
    caption: str
    lines: list[Line]
    notes: Sequence[str] = ()


def all_tables(cells: list[Cell], spec: Json, paper: Json) -> list[Json]:
    """Every table of tables.yaml; one without any line says which experiment it lacks."""
    found = []
    for table in spec["tables"]:
        groups = table.get("groups", [table])
        sections = [section for group in groups for section in _sections(cells, group, table, paper)]
        if not sections:
            names = [table["name"]] if table.get("experiments", "all") == "all" else table["experiments"]
            lacking = ", ".join(f"experiment={name}" for name in names)
            sections = [Section("No records", "", [Line({"ours": f"not run in this profile: {lacking}"})])]
        sections += [_printed(paper[table["printed"]])] if "printed" in table else []
        found.append(table | {"sections": sections})
    return found


def _sections(cells: list[Cell], group: Json, spec: Json, paper: Json) -> list[Section]:
    """Of a table, or of a group of it: a section a cell, or sections with a line a cell."""
    own = [cell for cell in of(cells, group["experiments"]) if agrees(cell.facts, group.get("where", {}))]
    own = [cell for cell in own if _rows(cell, spec)]
    if "by" not in spec:
        return [_of_cell(cell, spec, paper) for cell in own]
    lines, axes = dict[str, list[Line]](), group.get("axes", [])
    for cell in sorted(own, key=lambda cell: [_size(cell.facts[axis]) for axis in axes]):
        line = _line(cell, "", _columns(cell, [], spec))
        line = line._replace(texts={axis: str(cell.facts[axis]) for axis in axes} | line.texts)
        heading = cell.name.machine if spec["by"] == "machine" else group["title"]
        lines.setdefault(heading, []).append(line)
    return [_section(heading, "", own) for heading, own in lines.items()]


def _size(value: object) -> float:
    """How far out a point stands on an axis: numbers by size, linears by how many, names as they come."""
    return float(value) if isinstance(value, (int, float)) else float(str(value).count(","))


def _of_cell(cell: Cell, spec: Json, paper: Json) -> Section:
    """A line for each row of a cell, or for each part of a quantity of it."""
    rows, prefix = _rows(cell, spec), spec.get("per", "")
    columns, notes = _columns(cell, rows, spec), [note.format(**paper) for note in spec.get("notes", [])]
    if "paper" in spec:
        table = paper[spec["paper"]]
        cell, labels = _with_paper(cell, rows, table), {row["arm"]: row["label"] for row in table["rows"]}
        notes += [f"Paper, {labels[one['arm']]}: {one['why']}." for one in table["exceptions"]]
    every = [(row, name) for row in rows for name in (cell.found[row] if prefix else [""])]
    parts = [(row, name.removeprefix(prefix)) for row, name in every if name.startswith(prefix)]
    lines = [_line(cell, row, [_filled(column, part) for column in columns]) for row, part in parts]
    word = spec.get("words", {}).get(cell.name.experiment)
    heading = f"{word}: {cell.name.title}" if word else cell.name.title
    return _section(heading, cell.name.caption, lines, notes)


def _section(heading: str, caption: str, lines: list[Line], notes: Sequence[str] = ()) -> Section:
    """A section without the columns in which nothing stands."""
    names = dict.fromkeys(name for line in lines for name, text in line.texts.items())
    held = [name for name in names if any(line.texts.get(name, GAP) != GAP for line in lines)]
    lines = [line._replace(texts={name: line.texts.get(name, GAP) for name in held}) for line in lines]
    return Section(heading, caption, lines, notes)


def _with_paper(cell: Cell, rows: list[str], table: Json) -> Cell:
    """The cell with what the paper prints in each row, as quantities paper.NAME; paper.ratio is of times."""
    found = {row: dict(cell.found.get(row, {})) for row in rows}
    for row in table["rows"]:
        own = {name: row[name] for name in table["columns"]}
        own["ratio"] = row["ms_per_token"] / table["rows"][0]["ms_per_token"]
        found.get(row["arm"], {}).update({f"paper.{name}": Number(value) for name, value in own.items()})
    return replace(cell, found=cell.found | found)


def _rows(cell: Cell, spec: Json) -> list[str]:
    """The rows of a cell that stand in a table; none where too few of them were measured."""
    found, wanted = list(spec.get("rows", [])), spec.get("having", [])
    prefixes = tuple(name for name in wanted if name.endswith("."))
    for row, own in cell.found.items():
        if row not in found and any(name in wanted or name.startswith(prefixes) for name in own):
            found.append(row)
    valued = spec.get("having_value", "")
    found += [row for row in cell.found if row not in found and cell.number(row, valued)]
    return found if sum(bool(cell.found.get(row)) for row in found) >= spec.get("least", 1) else []


def _columns(cell: Cell, rows: list[str], spec: Json) -> list[Json]:
    """The columns, those with `each` once for each quantity or row that there is."""
    found = []
    for column in spec["columns"]:
        if prefix := column.get("each"):
            names = dict.fromkeys(name for row in rows for name in cell.found.get(row, {}))
            parts = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            parts = sorted(parts, key=float) if "by_size" in column else parts
            found += [_filled(column | {"quantity": prefix + "{}"}, part) for part in parts]
        elif quantity := column.get("each_row"):
            held = [row for row, own in cell.found.items() if quantity in own]
            of = {"quantity": quantity}
            found += [_filled(column, cell.row(row).label) | of | {"row": row} for row in held]
        else:
            found.append(column)
    return found


def _filled(column: Json, part: str) -> Json:
    return {name: value.format(part) if isinstance(value, str) else value for name, value in column.items()}


def _line(cell: Cell, row: str, columns: list[Json]) -> Line:
    """One line: of a row, or without one of the whole cell."""
    texts, records = {}, dict[str, None]()
    for column in columns:
        own = column.get("row", row)
        if "label" in column:
            text = getattr(cell.name if column["label"] == "title" else cell.row(own), column["label"])
        else:
            text = column["text"] if "text" in column else _number_text(cell, own, column)
            records |= dict.fromkeys(cell.number(own, column.get("quantity", "")).records)
        texts[column["heading"]] = text or GAP
    return Line(texts, (*cell.key, row), tuple(records))


def _number_text(cell: Cell, row: str, column: Json) -> str:
    """A number as its column prints it, or why there is none."""
    quantity, form = column["quantity"], column.get("format", "digits")
    number = cell.number(row, quantity)
    if form == "word" or not number:
        told = form == "word" or column.get("reason")
        return number.reason if told and quantity in cell.found.get(row, {}) else ""
    said = formats.shown(form, number) + column.get("unit", "")
    if column.get("noise") and number.low < number.high and not cell.resolved(row, number):
        said = f"not resolved: {said}"
    for name, word in (("error", " ± "), ("bound", " of ")):
        if beside := cell.number(row, column.get(name, "")):
            said += word + formats.plain(form, beside.value)
    other = column.get("more_than")
    base = cell.number(other.get("row", row), other.get("quantity", quantity)) if other else None
    if base and base.value != number.value:
        said += f" ({formats.percent_text(number.value / base.value)})"
    return f"{number.reason} {said}" if column.get("named") else said


def _printed(table: Json) -> Section:
    """The paper's accuracies, in a section of their own: its tasks are not ours."""
    labels, lines = {row["method"]: row["label"] for row in table["rows"]}, []
    means = {row.get("method"): float(np.mean(row["accuracy"])) for row in table["rows"]}
    for row in [*table["rows"], *table.get("beside", [])]:
        mean = float(np.mean(row["accuracy"]))
        values = zip([*table["tasks"], "average"], [*row["accuracy"], mean], strict=True)
        gain = GAP if row.get("method", "lora") == "lora" else f"{mean - means['lora']:+.2f}"
        texts = {"method": row["label"]} | {name: f"{value:.2f}" for name, value in values}
        lines.append(Line(texts | {"minus LoRA": gain}))
    notes = [f"{labels[one['method']]}: {one['why']}." for one in table["exceptions"]]
    notes.append(f"{table['columns']['accuracy']['why']}.")
    return Section(f"The paper's numbers ({table['backbone']})", "", lines, notes)
