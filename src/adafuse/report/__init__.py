"""The report: records alone become measurements, claims, tables, figures and one page; torch is never imported.

In: a folder of records, with `membership.csv` in it or beside it. Out: `Report`, which claims, tables, figures and the
page take, and `load_measurements`, which reads the numbers that a report has written. Next: frames.py.

    >>> read(Path("results/reference")).measurements.query("quantity == 'ratio' and row == 'adafuse_switch'")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from adafuse import archive
from adafuse.records import Record
from adafuse.report import accuracy, latency, membership, routing
from adafuse.report.beside import beside
from adafuse.report.frames import Frames
from adafuse.report.frames import frames as tidy
from adafuse.report.measurements import Measured, load_measurements, values_frame

__all__ = ["Report", "build", "load_measurements", "read"]

RESULTS = Path(__file__).resolve().parents[3] / "results"


# hashable by what it is, so that what figures need of it can be kept
@dataclass(frozen=True, eq=False)
class Report:
    """What was read; what was measured, in the order of tables and as its file has it; and what the paper prints."""

    frames: Frames
    measured: Measured
    measurements: pd.DataFrame
    paper: dict[str, Any]


def read(folder: Path) -> Report:
    """The report on all records below a folder. Raises ValueError with one line if there are none."""
    places = [place / "membership.csv" for place in (folder, folder.parent)]
    rows = next((membership.read(place) for place in places if place.exists()), None)
    return build(archive.load([folder]).records, rows)


def build(records: Iterable[Record], rows: pd.DataFrame | None = None) -> Report:
    """Measure everything in `records`; `rows` is their membership, without which headers tell the experiment.

    Raises ValueError with one line if no record can be used.
    """
    found = tidy(records, rows, specification("withdrawn")["withdrawn"])
    timed = beside(partial(latency.measure, found))
    studied = [accuracy.measure(found), routing.measure(found)]
    parts = [timed(), *studied]
    values = pd.concat([part.values for part in parts], ignore_index=True)
    cells, names = (
        [cell for part in parts for cell in part.cells],
        [row for part in parts for row in part.rows],
    )
    return Report(found, Measured(values, cells, names), values_frame(values), specification("paper_tables"))


def specification(name: str) -> dict[str, Any]:
    """What results/NAME.yaml holds: paper_tables, withdrawn, claims, tables or figures."""
    # the parser in C takes a tenth of the time
    found: dict[str, Any] = yaml.load((RESULTS / f"{name}.yaml").read_text(), yaml.CSafeLoader)
    return found
