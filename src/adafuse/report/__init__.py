"""The report: records alone become tables, figures and verdicts; nothing is typed in by hand.

In: records of any status and the paper's numbers. Out: a folder with `tables/` and `figures/`, the same bytes
for the same records. Next: cells.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from adafuse.records import Record
from adafuse.report import (
    accuracy_sheet,
    accuracy_table,
    backbones,
    calibration,
    claims,
    drift,
    evidence,
    figures,
    generation,
    goals,
    kernels,
    layers,
    losses,
    routing,
    scan_table,
    sheet,
    style,
    tables,
    timing,
    traces,
    tuning,
    why,
)
from adafuse.report.cells import Cell
from adafuse.report.paper import load_paper
from adafuse.report.trained import Trained, trained_adapters
from adafuse.report.verdicts import Claim

# names of figures that an earlier report may have left
OURS = (
    *("figure[12]*", "latency_*", "scan_*", "timeline_*", "drift*", "loss*"),
    *("why_*", "load.*", "load_cell*", "agreement*"),
)


@dataclass(frozen=True)
class Findings:
    """What the records hold, grouped once for every table and figure."""

    records: list[Record]
    latency: list[Cell]
    trained: Trained
    layers: list[Cell]
    kernels: list[Cell]
    drift: list[Cell]
    traces: list[Cell]
    curves: list[list[losses.Curve]]
    paper: dict[str, Any]

    @property
    def headed(self) -> list[Record]:
        """Without what a process left that was killed before its first line."""
        return [record for record in self.records if record.run]

    @property
    def claims(self) -> list[Claim]:
        return claims.all_claims(self.latency, self.trained.studies, self.layers, self.paper)


def find(records: list[Record]) -> Findings:
    """Group records into cells. Raises ValueError with one line if there are none."""
    headed = [record for record in records if record.run]
    if not records:
        raise ValueError(
            "no records found: run `make reproduce` first, or pass another folder with --records"
        )
    return Findings(
        records=records,
        latency=timing.latency_cells(headed),
        trained=trained_adapters(headed),
        layers=layers.layer_cells(headed),
        kernels=kernels.kernel_cells(headed),
        drift=drift.drift_cells(headed),
        traces=traces.trace_cells(headed),
        curves=losses.loss_curves(headed),
        paper=load_paper(),
    )


def all_sheets(found: Findings) -> list[sheet.Sheet]:
    """Every table, verdicts first: the paper's claims, then our own goals."""
    latency, adapters, paper = found.latency, found.trained, found.paper
    return [
        claims.sheet(found.claims),
        goals.sheet(latency, found.kernels),
        tables.table1(latency, paper),
        *(
            accuracy_table.table(name, adapters.studies, paper, adapters.fits)
            for name in ("table2", "table3", "table4")
        ),
        accuracy_sheet.sheet(adapters),
        tables.table5(latency, paper),
        tables.table6(latency, paper),
        tables.attribution(latency, paper),
        scan_table.sheet(latency),
        why.why_table(adapters.whys, adapters.fits),
        backbones.backbone_table(found.headed),
        tuning.tuning_table(found.headed),
        routing.routing_table(adapters.routing),
        generation.generation_table(adapters.generated),
        layers.layer_table(found.layers, paper),
        kernels.kernel_table(found.kernels),
        drift.drift_table(found.drift),
        traces.trace_table(found.traces),
        evidence.checks(latency),
        evidence.timing(latency),
        calibration.sheet([*latency, *found.kernels, *found.layers]),
        evidence.all_records(found.records),
    ]


def all_figures(found: Findings) -> dict[str, Figure]:
    """Every figure that the records allow, by file name."""
    return figures.all_figures(
        found.latency,
        found.layers,
        found.curves,
        found.paper,
        found.drift,
        found.traces,
        found.trained,
    )


def draw(found: Findings, out: Path) -> list[Path]:
    """Write every table and figure below `out`; what an earlier report left there goes first."""
    _clear(out)
    written = [path for table in all_sheets(found) for path in sheet.write(table, out / "tables")]
    for name, figure in all_figures(found).items():
        written += style.save(figure, out / "figures" / name)
    if found.curves:
        path = out / "figures" / "loss.csv"
        pd.DataFrame(losses.loss_rows(found.curves)).to_csv(path, index=False, float_format="%.6g")
        written.append(path)
    return written


def _clear(out: Path) -> None:
    """A figure that is drawn no longer must not stay; other people's files do."""
    for pattern in OURS:
        for path in (out / "figures").glob(pattern):
            if path.suffix in (".svg", ".png", ".csv"):
                path.unlink()
