"""Training curves: the loss of every stage, method and seed, from the `loss` lines.

In: records. Out: one `Curve` for each stage and method, and rows for the CSV beside the figure. Next:
figures.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adafuse.records import Record
from adafuse.report.accuracy import is_pilot
from adafuse.report.cells import Cell, cells, title
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
    """Curves of the largest cell of adapters and of the backbone under them, methods in the usual order; the rest is
    in the records. Without adapters, the first backbone.
    """
    fitted = sorted(_cells(records, "train"), key=lambda cell: -len(cell.records))[:1]
    backbones = _cells(records, "pretrain")
    under = [cell for cell in backbones if not fitted or _backbone(cell) == _backbone(fitted[0])][:1]
    found = [Curve("pretrain", "backbone", [_curve(r) for r in cell.records], title(cell)) for cell in under]
    for cell in fitted:
        by_name = variants(list(cell.records))
        # a method's further settings are studies of their own: table why
        plain = [name for name in by_name if " " not in name] or list(by_name)
        found += [Curve("train", n, [_curve(r) for r in by_name[n]], title(cell)) for n in plain]
    return found


def _cells(records: list[Record], stage: str) -> list[Cell]:
    done = [r for r in records if r.run.get("task") == stage and r.status != "unfinished"]
    return cells([record for record in done if record.of("loss") and not is_pilot(record)], stage)


def _backbone(cell: Cell) -> list[Any]:
    """What a backbone is made of, and the kind of machine that made it."""
    return [cell.is_cpu, *(cell.config.get(name) for name in ("model", "pretrain"))]


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
