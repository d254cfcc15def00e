"""Training curves: the loss of every stage, method and seed, from the `loss` lines.

In: records. Out: for each backbone one `Curve` for each stage and method, and rows for the CSV beside the figures.
Next: figures.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

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


def loss_curves(records: list[Record]) -> list[list[Curve]]:
    """For each backbone its own curve and those of the largest cell of adapters on it, methods in the usual order; the
    rest is in the records. GPUs first, then by how many adapters were trained. Adapters on a backbone that was
    pre-trained elsewhere stand without it.
    """
    homes: dict[str, tuple[list[Cell], list[Cell]]] = {}
    for stage, place in (("pretrain", 0), ("train", 1)):
        for cell in _cells(records, stage):
            homes.setdefault(_backbone(cell), ([], []))[place].append(cell)
    by_size = sorted(
        homes.values(), key=lambda home: (_is_cpu(*home), -sum(len(cell.records) for cell in home[1]))
    )
    return [_on_one_backbone(*home) for home in by_size]


def _on_one_backbone(under: list[Cell], fitted: list[Cell]) -> list[Curve]:
    found = [
        Curve("pretrain", "backbone", [_curve(r) for r in cell.records], title(cell)) for cell in under[:1]
    ]
    for cell in sorted(fitted, key=lambda cell: -len(cell.records))[:1]:
        by_name = variants(list(cell.records))
        # a method's further settings are studies of their own: table why
        plain = [name for name in by_name if " " not in name] or list(by_name)
        found += [Curve("train", n, [_curve(r) for r in by_name[n]], title(cell)) for n in plain]
    return found


def _is_cpu(under: list[Cell], fitted: list[Cell]) -> bool:
    return [*under, *fitted][0].is_cpu


def _cells(records: list[Record], stage: str) -> list[Cell]:
    done = [r for r in records if r.run.get("task") == stage and r.status != "unfinished"]
    return cells([record for record in done if record.of("loss") and not is_pilot(record)], stage)


def _backbone(cell: Cell) -> str:
    """What a backbone is made of, and the kind of machine that made it."""
    return json.dumps(
        [cell.is_cpu, *(cell.config.get(name) for name in ("model", "pretrain"))], sort_keys=True
    )


def loss_rows(figures: list[list[Curve]]) -> list[Row]:
    """The points of every curve, one a row; `figure` counts the backbones as the figures do."""
    return [
        {
            "figure": number,
            "stage": curve.stage,
            "method": curve.method,
            "curve": index,
            "step": step,
            "loss": loss,
        }
        | {"source": curve.source}
        for number, curves in enumerate(figures, start=1)
        for curve in curves
        for index, (steps, losses) in enumerate(curve.seeds)
        for step, loss in zip(steps, losses, strict=True)
    ]


def _curve(record: Record) -> tuple[list[int], list[float]]:
    lines = [line for line in record.of("loss") if line["loss"] is not None]
    return [line["step"] for line in lines], [line["loss"] for line in lines]
