"""The report: records alone become measurements, claims, tables, figures and one page; torch is never imported.

In: a folder of records, with `membership.csv` in it or beside it. Out: `Report`, which claims, tables, figures and the
page take, and `load_measurements`, which reads the numbers that a report has written. Next: frames.py.

    >>> read(Path("results/reference")).measurements.query("quantity == 'ratio' and row == 'adafuse_switch'")
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from adafuse import archive
from adafuse.processes import end_with
from adafuse.records import Record
from adafuse.report import accuracy, latency, membership, routing
from adafuse.report.frames import Frames
from adafuse.report.frames import frames as tidy
from adafuse.report.measurements import Measured, load_measurements

__all__ = ["Report", "beside", "build", "load_measurements", "read", "specification"]

RESULTS = Path(__file__).resolve().parents[3] / "results"
T = TypeVar("T")
_work: list[Callable[[], Any]] = []


# hashable by what it is, so that what figures need of it can be kept
@dataclass(frozen=True, eq=False)
class Report:
    """What was read; what was measured, in the order of tables; and what the paper prints."""

    frames: Frames
    measured: Measured
    paper: dict[str, Any]

    @property
    def measurements(self) -> pd.DataFrame:
        """Every number, as `load_measurements` reads them."""
        return self.measured.values


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
    return Report(found, sum(studied, timed()), specification("paper_tables"))


def specification(name: str) -> dict[str, Any]:
    """What results/NAME.yaml holds: paper_tables, withdrawn, claims, tables or figures."""
    # the parser in C takes a tenth of the time
    found: dict[str, Any] = yaml.load((RESULTS / f"{name}.yaml").read_text(), yaml.CSafeLoader)
    return found


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Start `work` in a forked process, to which nothing has to be sent; what it returns or raises comes by pickle to
    whoever calls the function that is returned: half of measuring and of drawing, which take most of the report's time.

    Where a fork may hang, which is everywhere but on Linux, the work is done once its result is asked for.
    """
    if sys.platform != "linux":
        return work
    _work[:] = [work]
    # it waits for work without end, also for that of a process that was killed
    pool = ProcessPoolExecutor(1, get_context("fork"), end_with, (os.getpid(), signal.SIGKILL))
    done = pool.submit(_inherited)
    pool.shutdown(wait=False)
    return done.result


def _inherited() -> Any:
    return _work[0]()
