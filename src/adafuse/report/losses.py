"""Training curves: the loss of every stage, method and seed, from the `loss` lines.

In: records. Out: one `Curve` for each stage and method, and rows for the CSV beside the figure. Next:
figures.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from adafuse.records import Record
from adafuse.report.accuracy import is_pilot
from adafuse.report.cells import cells, title
from adafuse.report.sheet import Row
from adafuse.report.variants import variants


@dataclass(frozen=True)
class Curve:
    """One method's loss by step, one pair of lists for each seed; `source` says where it was trained."""

    stage: str
    method: str
    seeds: list[tuple[list[int], list[float]]]
    source: str


def loss_curves(records: list[Record]) -> list[Curve]:
    """Curves of the largest cell of each stage (the rest is in the records), methods in the usual order."""
    found: list[Curve] = []
    for stage in ("pretrain", "train"):
        done = [r for r in records if r.run.get("task") == stage and r.status != "unfinished"]
        own = [record for record in done if record.of("loss") and not is_pilot(record)]
        most = sorted(cells(own, stage), key=lambda cell: -len(cell.records))[:1]
        for cell in most:
            if stage == "pretrain":
                found.append(Curve(stage, "backbone", [_curve(r) for r in cell.records], title(cell)))
                continue
            by_name = variants(list(cell.records))
            # a method's further settings are studies of their own: table why
            plain = [name for name in by_name if " " not in name] or list(by_name)
            found += [Curve(stage, n, [_curve(r) for r in by_name[n]], title(cell)) for n in plain]
    return found


def loss_rows(curves: list[Curve]) -> list[Row]:
    """The points of every curve, one a row."""
    return [
        {"stage": curve.stage, "method": curve.method, "curve": index, "step": step, "loss": loss}
        for curve in curves
        for index, (steps, losses) in enumerate(curve.seeds)
        for step, loss in zip(steps, losses, strict=True)
    ]


def _curve(record: Record) -> tuple[list[int], list[float]]:
    lines = [line for line in record.of("loss") if line["loss"] is not None]
    return [line["step"] for line in lines], [line["loss"] for line in lines]
