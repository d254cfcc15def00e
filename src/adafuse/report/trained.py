"""What the records say about trained adapters, grouped once: tables of the paper, why studies, strategies, routers.

In: records that have a header. Out: one `Trained`. Next: findings_accuracy.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from adafuse.records import Record
from adafuse.report.accuracy import Study, studies
from adafuse.report.budgets import in_both_budgets
from adafuse.report.cells import Cell
from adafuse.report.elsewhere import told_elsewhere, varied
from adafuse.report.fits import Fits, fits
from adafuse.report.generation import Generated, generated
from adafuse.report.routing import routing_cells
from adafuse.report.why_studies import Why, why_studies


@dataclass(frozen=True)
class Trained:
    """Studies of Tables 2 to 4, of one knob each, of one adapter through several strategies; and the training."""

    studies: list[Study]
    whys: list[Why]
    generated: list[Generated]
    routing: list[Cell]
    fits: Fits


def trained_adapters(records: list[Record]) -> Trained:
    """Group evaluate and train records; one record may stand in several studies."""
    records = in_both_budgets(records)
    whys, through = why_studies(records), generated(records)
    elsewhere = told_elsewhere(records, whys, [record for group in through for record in group.records])
    return Trained(
        studies(records, elsewhere), whys, through, routing_cells(records, varied(whys)), fits(records)
    )
