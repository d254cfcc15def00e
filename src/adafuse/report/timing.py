"""What a latency cell says about each arm: its time, its ratio to the backbone, its cost, or why there is no
time.

In: a `Cell` of latency records. Out: `ArmResult` by arm, and ratios between any two arms. Next: tables.py,
claims.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adafuse.records import Record
from adafuse.report.cells import Cell, base_key, cells, first_error, short_name
from adafuse.report.text import short
from adafuse.stats import Interval, is_resolved, paired_ratio

BASE, AGAIN = "base", "base_again"


@dataclass
class ArmResult:
    """One arm of one cell; `reason` says why there is no time, sizes are totals with the backbone."""

    arm: str
    label: str
    ms_per_token: float | None
    ratio: Interval | None
    resolved: bool
    reason: str | None
    cost: dict[str, Any]
    memory: dict[str, Any]
    files: list[str]


def latency_cells(records: list[Record]) -> list[Cell]:
    """The latency cells among `records`, one for each set of arms."""
    return cells(records, "latency")


def cells_for(latency: list[Cell], arms: list[str]) -> list[Cell]:
    """Of the cells that differ only in their arms, the one that holds most of `arms`.

    A cell with fewer than two adapters among them (a scan with arms of its own) is shown only if there is no
    other.
    """
    best: dict[str, Cell] = {}
    for cell in latency:
        key = base_key(cell)
        if key not in best or _held(cell, arms) > _held(best[key], arms):
            best[key] = cell
    held = {key: _held(cell, [arm for arm in arms if arm != BASE]) for key, cell in best.items()}
    least = 2 if max(held.values(), default=0) >= 2 else 1
    return [cell for key, cell in best.items() if held[key] >= least]


def ratio(cell: Cell, arm: str, base: str = BASE) -> Interval | None:
    """Time of `arm` over time of `base`, paired by round within each process; None if no process has both."""
    pairs = []
    for rounds in cell.rounds.values():
        if arm in rounds and base in rounds:
            both = rounds[[arm, base]].dropna() if arm != base else rounds[[arm]].dropna()
            if len(both):
                pairs.append((both[arm].to_numpy(), both[base].to_numpy()))
    return paired_ratio(pairs) if pairs else None


def again(cell: Cell) -> Interval | None:
    """The A/A arm: the backbone over itself."""
    return ratio(cell, AGAIN)


def results(cell: Cell, arms: list[str] | None = None) -> dict[str, ArmResult]:
    """One result for each of `arms`, or for every arm that the cell was to run."""
    noise = again(cell)
    return {arm: _result(cell, arm, noise) for arm in arms or cell.config["arms"]["run"]}


def missing(cell: Cell, arm: str) -> str:
    """Why an arm has no time."""
    if not cell.finished:
        return "unfinished record: run the same command again"
    if arm not in cell.config["arms"]["run"]:
        return f"not run: arm is not in arms={cell.config['arms'].get('name')}"
    for _, check in cell.of("check"):
        if check["arm"] == arm and not check["passed"]:
            return f"check failed: {check['check']} {short(check['value'])}, bound {short(check['bound'])}"
    named = first_error(cell.finished, arm)
    if named:
        return named
    excluded = [line["excluded"] for _, line in cell.of("block") if line["arm"] == arm and line["excluded"]]
    if excluded:
        return f"every block excluded: {excluded[0]}"
    return first_error(cell.finished) or "not in the record"


def _result(cell: Cell, arm: str, noise: Interval | None) -> ArmResult:
    per_process = [rounds[arm].dropna().median() for rounds in cell.rounds.values() if arm in rounds]
    found = ratio(cell, arm)
    label = cell.config["arms"].get("table", {}).get(arm, {}).get("label", arm)
    return ArmResult(
        arm=arm,
        label=label,
        ms_per_token=float(np.median(per_process)) if per_process else None,
        ratio=found,
        resolved=found is not None and is_resolved(found, noise),
        reason=None if per_process else missing(cell, arm),
        cost=_first(cell, "cost", arm),
        memory=_first(cell, "memory", arm),
        files=[short_name(r) for r in cell.finished if _mentions(r, arm)],
    )


def _first(cell: Cell, kind: str, arm: str) -> dict[str, Any]:
    return next((line for _, line in cell.of(kind) if line["arm"] == arm), {})


def _mentions(record: Record, arm: str) -> bool:
    return any(line.get("arm") == arm for line in record.lines)


def _held(cell: Cell, arms: list[str]) -> int:
    return len(set(arms) & set(cell.config["arms"]["run"]))
