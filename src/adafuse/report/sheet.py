"""A table on paper: sections of rows with a caption, written as Markdown for readers and as CSV for programs.

In: rows as dictionaries and, for each column, a function from row to text. Out: `<name>.md` and `<name>.csv`,
the same bytes for the same records. Every row names the record files it came from. Next: tables.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from adafuse.stats import Difference, Interval

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


@dataclass
class Section:
    """One cell's part of a table. Rows hold numbers; `columns` says how they are printed."""

    heading: str
    caption: str
    rows: list[Row]
    columns: Columns
    notes: list[str] = field(default_factory=list)


@dataclass
class Sheet:
    """One table: a file name, a title, what it shows, and its sections."""

    name: str
    title: str
    about: str
    sections: list[Section]


def write(sheet: Sheet, folder: Path) -> list[Path]:
    """Write Markdown and CSV below `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{sheet.name}.md", folder / f"{sheet.name}.csv"
    text.write_text(markdown(sheet))
    rows = [{"section": s.heading} | flat(row) for s in sheet.sections for row in s.rows]
    pd.DataFrame(rows).to_csv(data, index=False, lineterminator="\n")
    return [text, data]


def nothing(reason: str, heading: str = "No records", caption: str = "") -> Section:
    """The section of a table that has no rows: the reason."""
    return Section(heading, caption, [{"reason": reason, "records": []}], {"ours": lambda row: row["reason"]})


def markdown(sheet: Sheet) -> str:
    """The whole table as Markdown."""
    parts = [f"# {sheet.title}", sheet.about]
    for section in sheet.sections:
        parts += [f"## {section.heading}", *section_parts(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def section_parts(section: Section, with_records: bool = True) -> list[str]:
    """Caption, grid, notes and the list of record files of one section."""
    files = list(dict.fromkeys(file for row in section.rows for file in row.get("records", [])))
    number = {file: str(index + 1) for index, file in enumerate(files)}
    columns = dict(section.columns)
    if files and with_records:
        columns["records"] = lambda row: ", ".join(number[file] for file in row.get("records", []))
    parts = [section.caption, grid(section.rows, columns), *section.notes]
    if files and with_records:
        parts.append("Records: " + "; ".join(f"{number[file]} = `{file}`" for file in files))
    return [part for part in parts if part]


def grid(rows: list[Row], columns: Columns) -> str:
    """A Markdown grid, first column left and numbers as they were formatted."""
    cells = [[show(row).replace("|", r"\|").replace("\n", " ") for show in columns.values()] for row in rows]
    return str(tabulate(cells, headers=list(columns), tablefmt="github", disable_numparse=True))


def flat(row: Row) -> Row:
    """One CSV line: an interval becomes four columns, a list of files one text; keys with an underscore stay
    out.
    """
    out: Row = {}
    for key, value in row.items():
        if key.startswith("_"):
            continue
        if isinstance(value, Interval):
            out |= {key: value.ratio, f"{key}_low": value.low, f"{key}_high": value.high}
            out[f"{key}_method"] = value.method
        elif isinstance(value, Difference):
            out |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
            out[f"{key}_method"] = value.method
        else:
            out[key] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in out.items()}
