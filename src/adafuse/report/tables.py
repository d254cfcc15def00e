"""Tables by one mechanism: results/tables.yaml says which rows of which experiments, which columns, and how printed.

In: a `Board` and the specification. Out: `Table`s, which print themselves as Markdown for readers and as CSV for
programs. A number that is missing shows its reason where its column says `reason`. Next: page.py.

A section is a cell with a line for each of its rows: those named in `rows`, those that have a quantity of `having`, or
a value of one of `having_value`; with `per: PREFIX` a line for each quantity of a row that begins so, whose end fills
the {} of columns. With `by: machine` or `by: group` a line is a cell, and a section is a machine, or a group of
`groups`, which is sorted by its `axes`, facts of a cell. `words` stand before titles, by experiment. A column is one of
  {label: NAME}     what a row is called or is: label, row, method, routing, strategy, runtime, part; of a cell: title
  {quantity: NAME}  a number: `format` as in formats.py, or `n`, `word` (its reason); `row` if it is of another row than
                    the line's; `named` after its reason; beside it its standard `error`, its `bound`, or by how much it
                    is `more_than` the same of another row, or another quantity
  {each: PREFIX}    a column for each quantity that begins so; {each_row: NAME} a column for each row of the cell
  {paper: NAME}     what the paper prints in this row, as a `ratio` to its backbone, or with what it has `more`
A column in which nothing stands is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from adafuse.report import formats
from adafuse.report.board import Board, Place
from adafuse.report.claims import Claim, Json, agrees, printed_row
from adafuse.report.formats import GAP
from adafuse.report.naming import commit_text
from adafuse.report.rules import Number


@dataclass(frozen=True)
class Shown:
    """What stands in one place of a table: the text, and the number behind it for programs."""

    text: str
    number: Number | None = None


NOTHING = Shown(GAP)
# what the table of records takes from their headers
RECORD = ("name", "task", "profile", "seed", "replicate", "machine", "host", "status")


@dataclass
class Line:
    """One line: by heading what stands there; the cell and row that it is about, and the records behind it."""

    shown: dict[str, Shown]
    key: tuple[str, ...] = ()
    records: tuple[str, ...] = ()


@dataclass
class Section:
    """One part of a table."""

    heading: str
    caption: str
    lines: list[Line]
    notes: list[str] = field(default_factory=list)

    @property
    def headings(self) -> list[str]:
        """Every column in which something stands, in the order in which columns are first met."""
        every = dict.fromkeys(name for line in self.lines for name in line.shown)
        return [
            name for name in every if any(line.shown.get(name, NOTHING).text != GAP for line in self.lines)
        ]


@dataclass
class Table:
    """One table: a file name, a title, what it shows, and its sections."""

    name: str
    title: str
    about: str
    sections: list[Section]


def all_tables(board: Board, spec: Json, paper: Json) -> list[Table]:
    """Every table of tables.yaml; one without any line says which experiment it lacks."""
    return [_table(board, one, paper) for one in spec["tables"]]


def claims_table(claims: Iterable[Claim], board: Board, about: str) -> Table:
    """Verdicts first: a section for each cell."""
    found = Table("claims", "Claims and verdicts", about, [])
    for claim in claims:
        shown = {"where": claim.where, "claim": claim.text, "paper": claim.printed, "ours [95 %]": claim.ours}
        name = board.name(claim.place) if claim.place else None
        _judged(found, claim, shown, "why", name.title if name else "Not run", name.caption if name else "")
    return found


def goals_table(goals: Iterable[Claim], about: str) -> Table:
    """Our own goals, by machine."""
    found = Table("goals", "Our own goals", about, [])
    for goal in goals:
        shown = {"goal": goal.text, "bound": goal.printed, "ours [95 %]": goal.ours}
        _judged(found, goal, shown, "measured", goal.where)
    found.sections = found.sections or [_nothing("no record of a GPU")]
    return found


def records_table(runs: pd.DataFrame, board: Board, about: str) -> Table:
    """Every record with its fate; failed and unfinished ones too."""
    section = Section("All", "", [])
    for record, run in runs.to_dict("index").items():
        at = Place("", ""), str(record)
        error = board.find(*at, "errors")
        texts = {"record": str(record)} | {name: str(run[name]) for name in RECORD}
        texts["commit"] = commit_text(run["commit"], run["dirty"])
        texts |= {name: formats.digits(board.value(*at, name)) for name in ("seconds", "peak_rss_gib")}
        texts["first error"] = error.reason if error else GAP
        section.lines.append(Line({name: Shown(text) for name, text in texts.items()}, (*at[0], at[1])))
    return Table("records", "Records", about, [section])


def markdown(table: Table) -> str:
    """The whole table as Markdown."""
    parts = [f"# {table.title}", table.about]
    for section in table.sections:
        parts += [f"## {section.heading}", section_markdown(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def section_markdown(section: Section) -> str:
    """Caption, grid, notes and records of one section."""
    names = section.headings
    rows = [names, ["---"] * len(names)]
    rows += [[line.shown.get(name, NOTHING).text for name in names] for line in section.lines]
    lines = [" | ".join(text.replace("|", r"\|").replace("\n", " ") for text in row) for row in rows]
    grid = [f"| {line} |" for line in lines]
    records = dict.fromkeys(record for line in section.lines for record in line.records)
    named = f"Records: {', '.join(records)}." if records else ""
    return "\n\n".join(part for part in (section.caption, "\n".join(grid), *section.notes, named) if part)


def frame(table: Table) -> pd.DataFrame:
    """The table for programs: numbers with the ends of their intervals, and as text what is no number."""
    rows = []
    for section in table.sections:
        for line in section.lines:
            row: Json = {"section": section.heading}
            for name, shown in line.shown.items():
                number = shown.number
                row[name] = shown.text if number is None else number.value
                if number and not math.isnan(number.low):
                    row |= {f"{name} low": number.low, f"{name} high": number.high}
            rows.append(row | {"records": " ".join(line.records)})
    return pd.DataFrame(rows)


def _judged(table: Table, claim: Claim, shown: Json, why: str, heading: str, caption: str = "") -> None:
    """Add a claim to its section."""
    shown |= {"verdict": claim.verdict.verdict, why: claim.verdict.why}
    numbers = {name: own if isinstance(own, Number) else None for name, own in shown.items()}
    line = Line({name: Shown(formats.ours_text(own), numbers[name]) for name, own in shown.items()})
    line.key, line.records = (*claim.place, claim.row) if claim.place else (), claim.records
    _section(table, heading, caption).lines.append(line)


def _section(table: Table, heading: str, caption: str = "") -> Section:
    """The section of a table that has this heading, a new one if need be."""
    for section in table.sections:
        if section.heading == heading:
            return section
    table.sections.append(Section(heading, caption, []))
    return table.sections[-1]


def _nothing(reason: str) -> Section:
    return Section("No records", "", [Line({"ours": Shown(reason)})])


def _table(board: Board, spec: Json, paper: Json) -> Table:
    found = Table(spec["name"], spec["title"], spec["about"], [])
    for group in spec.get("groups", [spec]):
        known = board.places(None if group["experiments"] == "all" else group["experiments"])
        places = [place for place in known if agrees(board.facts(place), group.get("where", {}))]
        places = [place for place in places if _rows(board, place, spec)]
        if spec.get("by", "cell") == "cell":
            found.sections += [_cell(board, place, spec, paper) for place in places]
            continue
        axes: list[str] = group.get("axes", [])
        places.sort(key=lambda place: [_size(board.facts(place)[axis]) for axis in axes])
        for place in places:
            heading = board.name(place).machine if spec["by"] == "machine" else group["title"]
            line = _line(board, place, ("", ""), _expanded(board, place, [], spec), spec, paper)
            line.shown = {axis: Shown(str(board.facts(place)[axis])) for axis in axes} | line.shown
            _section(found, heading).lines.append(line)
    if not found.sections:
        names = [spec["name"]] if spec.get("experiments", "all") == "all" else spec["experiments"]
        lacking = ", ".join(f"experiment={name}" for name in names)
        found.sections.append(_nothing(f"not run in this profile: {lacking}"))
    if "printed" in spec:
        found.sections.append(_printed(paper[spec["printed"]]))
    return found


def _size(value: object) -> float:
    """How far out a point stands on an axis: a number by itself, linears by how many; names stay in their order."""
    return float(value) if isinstance(value, (int, float)) else float(str(value).count(","))


def _cell(board: Board, place: Place, spec: Json, paper: Json) -> Section:
    """A section with a line for each row of a cell, or for each part of a quantity of it."""
    rows, name, prefix = _rows(board, place, spec), board.name(place), spec.get("per", "")
    columns = _expanded(board, place, rows, spec)
    parts = {row: [own for own in board.of_row(place, row) if own.startswith(prefix)] for row in rows}
    every = [(row, own.removeprefix(prefix)) for row in rows for own in (parts[row] if prefix else [""])]
    word = spec.get("words", {}).get(place.experiment)
    lines = [_line(board, place, at, columns, spec, paper) for at in every]
    return Section(f"{word}: {name.title}" if word else name.title, name.caption, lines, _notes(spec, paper))


def _rows(board: Board, place: Place, spec: Json) -> list[str]:
    """The rows of a cell that stand in a table."""
    named, wanted = spec.get("rows", []), set(spec.get("having", []))
    rows = [*named, *(row for row in board.rows(place) if row not in named)]
    known = {row: board.of_row(place, row) for row in rows}
    found = [row for row in rows if row in named or wanted & known[row].keys()]
    if "per" in spec:
        found = [row for row in rows if any(name.startswith(spec["per"]) for name in known[row])]
    for quantity in spec.get("having_value", []):
        found += [row for row in rows if row not in found and board.value(place, row, quantity) is not None]
    return found if sum(bool(known[row]) for row in found) >= spec.get("least", 1) else []


def _expanded(board: Board, place: Place, rows: list[str], spec: Json) -> list[Json]:
    """The columns, those with `each` once for each quantity or row that there is; numbers by size."""
    found = []
    for column in spec["columns"]:
        prefix, quantity = column.get("each"), column.get("each_row")
        if prefix:
            names = dict.fromkeys(name for row in rows for name in board.of_row(place, row))
            parts = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            for part in sorted(parts, key=float) if all(map(_is_number, parts)) else parts:
                own = {key: column[key].format(part) for key in ("heading", "error") if key in column}
                found.append(column | own | {"quantity": prefix + part})
        elif quantity:
            held = [row for row in board.rows(place) if quantity in board.of_row(place, row)]
            labels = {row: board.row(place, row).label for row in held}
            found += [column | {"heading": labels[row], "row": row, "quantity": quantity} for row in held]
        else:
            found.append(column)
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _line(
    board: Board, place: Place, at: tuple[str, str], columns: list[Json], spec: Json, paper: Json
) -> Line:
    """One line: of a row, or of a part of a quantity of it; without a row, of the whole cell."""
    line, records = Line({}, (*place, at[0])), dict[str, None]()
    for column in columns:
        row, quantity = column.get("row", at[0]), column.get("quantity", "").format(at[1])
        if "paper" in column:
            shown = _of_paper(paper, spec["paper"], row, column)
        elif "label" in column:
            shown = Shown(at[1] if column["label"] == "part" else _label(board, place, row, column))
        else:
            shown = _of_number(board, place, row, quantity, column)
        line.shown[column["heading"]] = shown
        records |= dict.fromkeys(board.records(place, [row], [quantity]))
    line.records = tuple(records)
    return line


def _label(board: Board, place: Place, row: str, column: Json) -> str:
    name = column["label"]
    return str(getattr(board.name(place) if name == "title" else board.row(place, row), name)) or GAP


def _of_number(board: Board, place: Place, row: str, quantity: str, column: Json) -> Shown:
    """A number as its column prints it, or why there is none."""
    found, number = board.find(place, row, quantity), board.number(place, row, quantity)
    form = column.get("format", "digits")
    if found and form == "word":
        return Shown(found.reason or GAP)
    if number is None:
        return Shown((found.reason if found and column.get("reason") else "") or GAP)
    if form == "n":
        return Shown(str(number.n), Number(number.n))
    if form == "ratio":
        return Shown(formats.ratio_text(number, board.resolved(place, row, number.value)), number)
    if form in formats.WITH_INTERVAL:
        return Shown(formats.WITH_INTERVAL[form](number), number)
    said = formats.plain(form, number.value) + _beside(board, place, row, quantity, column)
    return Shown(f"{number.method} {said}" if column.get("named") else said, number)


def _beside(board: Board, place: Place, row: str, quantity: str, column: Json) -> str:
    """What stands after a number: its standard error, its bound, or how much more it is than another one."""
    form, value = column.get("format", "digits"), board.value(place, row, quantity)
    for name, word in (("error", " ± "), ("bound", " of ")):
        if name in column and (beside := board.value(place, row, column[name])) is not None:
            return word + formats.plain(form, beside)
    other = column.get("more_than", {})
    base = board.value(place, other.get("row", row), other.get("quantity", quantity)) if other else None
    return f" ({formats.percent_text(value / base)})" if base and value and value != base else ""


def _of_paper(paper: Json, table: str, row: str, column: Json) -> Shown:
    own, base = printed_row(paper, table, row), printed_row(paper, table, "base")
    name = column["paper"]
    if own.get(name) is None:
        return NOTHING
    ratio = own[name] / base[name]
    more = f" ({formats.percent_text(ratio)})" if ratio != 1 else ""
    if column.get("ratio"):
        return Shown(f"{formats.digits(ratio)}{more}" if more else "1", Number(ratio))
    said = f"{own[name]}{column.get('unit', '')}"
    return Shown(said + more if column.get("more") else said, Number(own[name]))


def _notes(spec: Json, paper: Json) -> list[str]:
    """What a reader must know: the specification's own remarks, and those of the paper's table."""
    notes, table = list(spec.get("notes", [])), paper.get(spec.get("paper", ""), {})
    if "ms_per_token" in table.get("columns", {}):
        notes.append(f"The paper's milliseconds are not comparable: {paper['absolute_ms']['why']}.")
    for entry in table.get("exceptions", []):
        notes.append(f"Paper, {printed_row(paper, spec['paper'], entry['arm'])['label']}: {entry['why']}.")
    return notes


def _printed(table: Json) -> Section:
    """The paper's accuracies, in a section of their own: its tasks are not ours."""
    rows = [*table["rows"], *table.get("beside", [])]
    labels = {row["method"]: row["label"] for row in table["rows"]}
    means = {row["label"]: float(np.mean(row["accuracy"])) for row in rows}
    lines = []
    for row in rows:
        numbers = dict(zip(table["tasks"], row["accuracy"], strict=True)) | {"average": means[row["label"]]}
        shown = {name: Shown(f"{value:.2f}", Number(value)) for name, value in numbers.items()}
        gain = means[row["label"]] - means[labels["lora"]]
        minus = Shown(f"{gain:+.2f}" if row.get("method", "lora") != "lora" else GAP)
        lines.append(Line({"method": Shown(row["label"]), **shown, "minus LoRA": minus}))
    notes = [f"{labels[entry['method']]}: {entry['why']}." for entry in table["exceptions"]]
    notes.append(f"{table['columns']['accuracy']['why']}.")
    return Section(f"The paper's numbers ({table['backbone']})", "", lines, notes)
