"""The verdict on each number that the paper prints: ours beside it, a rule, and the reason in words.

In: latency cells, studies, layer cells and the paper's numbers. Out: a list of `Claim`. Next:
claims_latency.py, claims_accuracy.py, verdicts.py (the rules, written out).

Only ratios and differences are judged. The paper's absolute milliseconds lie below the bandwidth floor of
every GPU it can have used, so they are shown and never compared.
"""

from __future__ import annotations

from typing import Any

from adafuse.report.accuracy import Study
from adafuse.report.cells import Cell
from adafuse.report.claims_accuracy import accuracy_claims, figure1_claim, figure2_claim, not_run
from adafuse.report.claims_latency import latency_claims, memory_claims
from adafuse.report.layers import figure1_cells, figure2_cells, points
from adafuse.report.memory import is_timed
from adafuse.report.sheet import Columns, Row, Section, Sheet
from adafuse.report.text import GAP, points_text, ratio_text
from adafuse.report.timing import cells_for
from adafuse.report.verdicts import RULES, Claim
from adafuse.stats import Difference, Interval


def all_claims(
    latency: list[Cell], found: list[Study], layers: list[Cell], paper: dict[str, Any]
) -> list[Claim]:
    """Every claim that these records can speak about, cell by cell, latency first."""
    claims: list[Claim] = []
    for cell in cells_for(latency, [row["arm"] for row in paper["table6"]["rows"]]):
        claims += latency_claims(cell, paper)
    for cell in latency:
        claims += [] if is_timed(cell) else memory_claims(cell, paper)
    for study in found:
        claims += accuracy_claims(study, paper)
    answered = {study.table for study in found}
    claims += [not_run(name, paper) for name in ("table2", "table3", "table4") if name not in answered]
    for cell in figure1_cells(layers):
        claims.append(figure1_claim(cell, paper))
    for cell in figure2_cells(layers):
        claims += [figure2_claim(cell, point) for point in points(cell)]
    return claims


def sheet(claims: list[Claim]) -> Sheet:
    """The claims as a table, one section for each cell."""
    columns: Columns = {
        "where": lambda row: row["where"],
        "claim": lambda row: row["text"],
        "paper": lambda row: row["printed"],
        "ours [95 %]": lambda row: ours_text(row["ours"]),
        "verdict": lambda row: f"**{row['verdict']}**",
        "why": lambda row: row["why"],
    }
    sections: dict[str, list[Row]] = {}
    for claim in claims:
        row = vars(claim) | {"records": claim.files}
        sections.setdefault(claim.cell, []).append(
            {k: v for k, v in row.items() if k not in ("files", "cell")}
        )
    found = [Section(cell, "", rows, columns) for cell, rows in sections.items()]
    return Sheet("claims", "Claims and verdicts", RULES, found)


def ours_text(ours: Interval | Difference | str | None) -> str:
    """Our side of a claim in a table."""
    if isinstance(ours, Interval):
        return ratio_text(ours)
    return points_text(ours) + " points" if isinstance(ours, Difference) else ours or GAP
