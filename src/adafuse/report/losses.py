"""Training curves: the loss of every stage, method and seed, from the `loss` lines.

In: records. Out: one `Curve` for each stage and method, and rows for the CSV beside the figure. Next:
figures.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from adafuse.records import Record
from adafuse.report.accuracy import ORDER
from adafuse.report.cells import cells, method_name, title
from adafuse.report.sheet import Row


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
        own = [r for r in records if r.run.get("task") == stage and r.status != "unfinished" and r.of("loss")]
        most = sorted(cells(own, stage), key=lambda cell: -len(cell.records))[:1]
        for cell in most:
            names = {method_name(record) for record in cell.records}
            if stage == "pretrain":
                found.append(Curve(stage, "backbone", [_curve(r) for r in cell.records], title(cell)))
                continue
            for name in sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)):
                same = [r for r in cell.records if method_name(r) == name]
                found.append(Curve(stage, name, [_curve(r) for r in same], title(cell)))
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
