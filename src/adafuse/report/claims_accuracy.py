"""Claims about accuracy (Tables 2 to 4) and about one adapted layer (Figures 1 and 2).

In: studies, layer cells and the paper's numbers. Out: claims. Next: readme.py.
"""

from __future__ import annotations

from typing import Any

from adafuse.report import verdicts
from adafuse.report.accuracy import Study, difference, heading
from adafuse.report.cells import Cell, short_name, title
from adafuse.report.layers import Point, figure1_point, tokens
from adafuse.report.on_par import judge_difference
from adafuse.report.variants import ADAFUSE, LORA
from adafuse.report.verdicts import NOT_TESTABLE, Claim, on_cell, timed_on
from adafuse.stats import Difference


def accuracy_claims(study: Study, paper: dict[str, Any]) -> list[Claim]:
    table, where = paper[study.table], f"Table {study.table[-1]}"
    labels = {row["method"]: row["label"] for row in table["rows"]}
    means = {row["method"]: sum(row["accuracy"]) / len(row["accuracy"]) for row in table["rows"]}
    claims = []
    for other in (name for name in means if name not in ("base", "full", ADAFUSE)):
        ours = difference(study, ADAFUSE, other)
        absent = [name for name in (ADAFUSE, other) if name not in study.variants]
        reason = f"no common items: not run for {' or '.join(absent)}" if absent else "no common items"
        verdict, why = judge_difference(ours, reason)
        text = f"AdaFuse no worse than {labels[other]}" + (" (plain)" if other == LORA else "") + ", average"
        printed = f"{means[ADAFUSE] - means[other]:+.2f} points"
        claims.append(_study_claim(study, where, text, printed, ours, verdict, why))
    return claims


def not_run(name: str, paper: dict[str, Any]) -> Claim:
    """The claim of a table that no record answers."""
    table, where = paper[name], f"Table {name[-1]}"
    why = f"not run in this profile: experiment={table['experiment']}"
    text = f"AdaFuse no worse than the other adapters, Table {name[-1]}'s tasks"
    return Claim("Not run", where, text, "see the table", None, NOT_TESTABLE, why)


def _study_claim(
    study: Study, where: str, text: str, printed: str, ours: Difference | None, verdict: str, why: str
) -> Claim:
    files = [short_name(record) for record in study.cell.finished]
    return Claim(heading(study.cell), where, text, printed, ours, verdict, on_cell(study.cell, why), files)


def figure1_claim(cell: Cell, paper: dict[str, Any]) -> Claim:
    point = figure1_point(cell)
    assert point is not None
    value = paper["figure1"]["adapters_ms"] / paper["figure1"]["backbone_ms"]
    verdict, why = verdicts.judge_ratio(value, point.ratio, "about")
    text = f"one MoRAL layer, one token, rank {point.rank}: adapters over backbone"
    return Claim(
        title(cell),
        "Figure 1",
        text,
        f"{value:.2f}",
        point.ratio,
        *timed_on(cell, verdict, why),
        list(point.files),
    )


def figure2_claim(cell: Cell, point: Point) -> Claim:
    verdict, why = verdicts.judge_above_one(point.ratio)
    when = f"{point.phase}, {tokens(point.sequence_length)}, rank {point.rank}"
    text = f"adapters take longer than the backbone: {when}"
    return Claim(
        title(cell), "Figure 2", text, "> 1", point.ratio, *timed_on(cell, verdict, why), list(point.files)
    )
