"""How each method's learning rate was chosen: the loss on held-out items by rate.

In: train records. Out: the sheet `learning_rates`. Next: why.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from adafuse.records import Record
from adafuse.report.accuracy import heading, is_pilot
from adafuse.report.cells import Cell, caption, cells, method_name, short_name
from adafuse.report.fits import validation_loss
from adafuse.report.knobs import RATE_FACTOR, learning_rate
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits
from adafuse.report.variants import method_file, overridden, rank

ABOUT = (
    "Mean loss on held-out items, nats a token, by learning rate; each method has the best of its own, so that none is "
    "compared at another's. Chosen on a seed that no study counts."
)


def tuning_table(records: list[Record]) -> Sheet:
    """A section for each cell in which a method was trained at several rates."""
    pilots = [record for record in records if record.run.get("task") == "train" and is_pilot(record)]
    sections = [section for cell in cells(pilots, "train") if (section := _section(cell))]
    reason = nothing("not run in this profile: experiment=learning_rate")
    return Sheet("learning_rates", "Learning rates", ABOUT, sections or [reason])


def _section(cell: Cell) -> Section | None:
    by_method: dict[str, dict[float, list[Record]]] = {}
    for record in cell.finished:
        if set(overridden(record)) <= {RATE_FACTOR}:
            by_method.setdefault(method_name(record), {}).setdefault(_rate(record), []).append(record)
    varied = {name: by_method[name] for name in sorted(by_method, key=rank) if len(by_method[name]) > 1}
    if not varied:
        return None
    rates = sorted({rate for found in varied.values() for rate in found})
    columns: Columns = {"method": lambda row: row["method"]}
    for rate in rates:
        columns[f"{rate:g}"] = partial(_loss_text, rate=rate)
    columns |= {
        "best": lambda row: GAP if row["best"] is None else f"{row['best']:g}",
        "in its file": lambda row: f"{row['file']:g}",
    }
    return Section(heading(cell), caption(cell), [_row(name, varied[name]) for name in varied], columns)


def _row(name: str, found: dict[float, list[Record]]) -> Row:
    losses = {rate: validation_loss(records) for rate, records in found.items()}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    every = [record for records in found.values() for record in records]
    row: Row = {"method": name} | {f"{rate:g}": loss for rate, loss in known.items()}
    row |= {"best": min(known, key=lambda rate: known[rate]) if known else None, "file": _file_rate(every)}
    return row | {"records": [short_name(record) for record in every]}


def _loss_text(row: Row, rate: float) -> str:
    return digits(row.get(f"{rate:g}"))


def _rate(record: Record) -> float:
    return learning_rate(record.run["config"])


def _file_rate(records: Iterable[Record]) -> float:
    """What training with the method's file as it is now would use."""
    first = next(iter(records))
    file = method_file(method_name(first), str(first.run.get("profile", "cpu")))
    return learning_rate(first.run["config"] | {"method": file})
