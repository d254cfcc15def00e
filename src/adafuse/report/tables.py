"""The latency tables: the paper's Tables 1, 5 and 6 beside ours, and the attribution that it lacks.

In: latency cells and the paper's numbers. Out: one `Sheet` each, a section for each cell; a cell of a table that cannot
be filled says why. Next: accuracy.py for Tables 2 to 4, evidence.py for checks, timing and records.
"""

from __future__ import annotations

from typing import Any

from adafuse.report import memory
from adafuse.report.cells import Cell, caption, title
from adafuse.report.paper import by_arm, notes
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import (
    CAPTURED,
    CHECK_NOTE,
    FLOOR_NOTE,
    GAP,
    MEMORY_NOTE,
    bound_text,
    count_text,
    digits,
    more_text,
    percent_text,
    printed_text,
    ratio_text,
    share_text,
    times_text,
)
from adafuse.report.timing import AGAIN, BASE, EAGER, GEMV, ArmResult, Comparison, base_of, cells_for, results

RATIO = "ratio to backbone [95 %]"
GEMV_RATIO = "ratio to backbone (our GEMV) [95 %]"
FLOOR = "time / floor"


def table1(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """Inference cost: time, parameters and multiply-accumulates per token."""
    columns: Columns = {
        "method": _label,
        "ms/token": _ms,
        RATIO: _ratio,
        "paper's ratio": lambda row: times_text(row["paper_ratio"]),
        FLOOR: _over_floor,
        "check": lambda row: bound_text(row["_check"]),
        "parameters": lambda row: count_text(row["params"], row["base_params"]),
        "paper's parameters": lambda row: more_text(row["paper_params_b"], row["paper_base_params_b"], " G"),
        "MACs/token": lambda row: count_text(row["macs"], row["base_macs"]),
        "paper's MACs": lambda row: more_text(row["paper_macs_g"], row["paper_base_macs_g"], " G"),
        "paper's ms": lambda row: printed_text(row["paper_ms_per_token"]),
    }
    about = "Backbone and dynamic adapters: what one decoded token costs. Ratios are paired by round."
    return _against_paper("table1", "Table 1: inference cost", about, columns, latency, paper)


def table5(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """Latency and peak memory."""
    columns: Columns = {
        "method": _label,
        "ms/token": _ms,
        RATIO: _ratio,
        "paper's ratio": lambda row: times_text(row["paper_ratio"]),
        FLOOR: _over_floor,
        "check": lambda row: bound_text(row["_check"]),
        "weights GiB": lambda row: digits(row["weights_gib"]),
        "peak GiB": _peak,
        "paper's GiB": lambda row: more_text(row["paper_peak_gib"], row["paper_base_peak_gib"]),
        "with load GiB": lambda row: digits(row["peak_load_gib"]),
        "process GiB": lambda row: digits(row["process_gib"]),
        "paper's ms": lambda row: printed_text(row["paper_ms_per_token"]),
    }
    about = "Time per decoded token and peak device memory of each method."
    heading = "Table 5: latency and peak memory"
    return _against_paper("table5", heading, about, columns, latency, paper, with_memory=True)


def table6(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """The paper's only ablation: merging, then one gate, then one launch."""
    columns: Columns = {
        "method": _label,
        "ms/token": _ms,
        RATIO: _ratio,
        "paper's ratio": lambda row: times_text(row["paper_ratio"]),
        FLOOR: _over_floor,
        "check": lambda row: bound_text(row["_check"]),
        "paper's ms": lambda row: printed_text(row["paper_ms_per_token"]),
    }
    about = "From adapters called one by one to one merging step per token."
    return _against_paper("table6", "Table 6: latency ablation", about, columns, latency, paper)


def attribution(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """Where the gain comes from: every routing under every strategy that was run."""
    rows = {row["arm"] for name in ("table1", "table5", "table6") for row in paper[name]["rows"]} | {AGAIN}
    timed = filter(memory.is_timed, latency)
    others = [cell for cell in timed if set(cell.config["arms"]["run"]) - rows]
    sections = [_attribution(cell) for cell in others]
    about = (
        "The controls that the paper lacks: shared gate or gate per layer, merged or not, one launch or many. "
        "The floor is the time to read each needed weight once at the measured bandwidth."
    )
    return Sheet("attribution", "Attribution", about, sections or [_not_run("attribution")])


def _attribution(cell: Cell) -> Section:
    """Every arm in the order in which it was asked for."""
    found = list(results(cell).values())
    columns: Columns = {
        "arm": _label,
        "runtime": lambda row: row["runtime"],
        "routing": lambda row: row["routing"] or GAP,
        "strategy": lambda row: row["strategy"] or GAP,
        "ms/token": _ms,
        RATIO: _ratio,
    }
    if any(result.to_gemv for result in found):
        columns[GEMV_RATIO] = _gemv_ratio
    columns |= {
        "floor ms": lambda row: digits(row["floor_ms"]),
        FLOOR: lambda row: digits(row["over_floor"]),
        "bandwidth used": lambda row: share_text(row["bandwidth_share"]),
        "check": lambda row: bound_text(row["_check"]),
    }
    rows = [_row(cell, result) | _runtime_part(result) for result in found]
    if any(row["peak_gib"] is not None for row in rows):
        columns["peak GiB"] = _peak_or_gap
    captured = any(result.runtime != EAGER for result in found)
    remarks = [CHECK_NOTE, *([CAPTURED] if captured else [])]
    return Section(title(cell), caption(cell), rows, columns, remarks)


def _runtime_part(result: ArmResult) -> Row:
    gemv = result.to_gemv
    return {"runtime": result.runtime, "gemv_ratio": gemv.ratio if gemv else None, "_to_gemv": gemv}


def _against_paper(
    name: str,
    heading: str,
    about: str,
    columns: Columns,
    latency: list[Cell],
    paper: dict[str, Any],
    with_memory: bool = False,
) -> Sheet:
    """The paper's rows of every cell that times them; other arms only for the memory that was measured of them."""
    table = paper[name]
    arms = [row["arm"] for row in table["rows"]]
    shown = [(cell, arms) for cell in cells_for(latency, arms)]
    if with_memory:
        shown = [(cell, [*dict.fromkeys(arms + memory.measured_arms(cell))]) for cell, _ in shown]
        shown += [(cell, memory.measured_arms(cell)) for cell in latency if not memory.is_timed(cell)]
    own_notes = [FLOOR_NOTE, MEMORY_NOTE if with_memory else CHECK_NOTE, *notes(table, paper)]
    sections = [
        Section(title(cell), caption(cell), _paper_rows(cell, own, table), columns, own_notes)
        for cell, own in shown
    ]
    return Sheet(name, heading, about, sections or [_not_run(table["experiment"])])


def _paper_rows(cell: Cell, arms: list[str], table: dict[str, Any]) -> list[Row]:
    found = results(cell, [*dict.fromkeys([*arms, BASE])])
    return [_row(cell, found[arm], found[BASE]) | _paper_row(table, arm) for arm in arms]


def _row(cell: Cell, result: ArmResult, base: ArmResult | None = None) -> Row:
    arm = cell.config["arms"].get("table", {}).get(result.arm, {})
    method = cell.config.get("methods", {}).get(arm.get("method"), {})
    floor_ms = result.cost.get("floor_ms")
    row: Row = {
        "arm": result.arm,
        "label": result.label,
        "routing": method.get("routing"),
        "strategy": None if _is_plain(result.arm) else result.strategy,
        "ms_per_token": result.ms_per_token,
        "ratio": None if result.arm == result.to_base.base else result.ratio,
        "resolved": result.resolved,
        "reason": result.reason or result.to_base.reason,
        "_to_base": result.to_base,
        "_check": result.check,
        "bandwidth_share": result.bandwidth_share,
    }
    row |= {f"check_{name}": (result.check or {}).get(name) for name in ("check", "value", "bound")}
    row |= {name: result.cost.get(name) for name in ("params", "macs", "floor_ms")}
    row |= {name: result.memory.get(name) for name in memory.SIZES}
    row["base_peak_gib"] = memory.of_arm(cell, base_of(result.runtime))[0].get("peak_gib")
    row["memory_note"] = result.memory.get("note")
    row["over_floor"] = result.ms_per_token / floor_ms if result.ms_per_token and floor_ms else None
    row |= {f"base_{name}": base.cost.get(name) for name in ("params", "macs")} if base else {}
    return row | {"records": result.files}


def _paper_row(table: dict[str, Any], arm: str) -> Row:
    """The printed numbers of this row and of the backbone's row; nothing where the paper has none."""
    own, base = by_arm(table).get(arm, {}), by_arm(table)[BASE]
    ms = own.get("ms_per_token")
    found: Row = {"paper_ratio": ms / base["ms_per_token"] if ms else None}
    for name in table["columns"]:
        found |= {f"paper_{name}": own.get(name), f"paper_base_{name}": base.get(name)}
    return found


def _not_run(experiment: str) -> Section:
    return nothing(f"not run in this profile: experiment={experiment}")


def _is_plain(arm: str) -> bool:
    """The backbone as it is, once or again; through our own product it has a strategy: fused."""
    return arm.startswith(BASE) and not arm.startswith(GEMV)


def _label(row: Row) -> str:
    return str(row["label"])


def _ms(row: Row) -> str:
    return digits(row["ms_per_token"]) if row["ms_per_token"] is not None else str(row["reason"])


def _ratio(row: Row) -> str:
    return _against(row, row["_to_base"])


def _gemv_ratio(row: Row) -> str:
    return _against(row, row["_to_gemv"]) if row["_to_gemv"] else GAP


def _against(row: Row, found: Comparison) -> str:
    """Without a time the reason stands under ms/token already."""
    if row["ms_per_token"] is None:
        return GAP
    return "1" if row["arm"] == found.base else ratio_text(found.ratio, found.resolved, found.reason)


def _over_floor(row: Row) -> str:
    """9.10 × 0.188 ms: the distance, and from what."""
    return GAP if row["over_floor"] is None else f"{digits(row['over_floor'])} × {digits(row['floor_ms'])} ms"


def _peak(row: Row) -> str:
    """A note says first why there is no peak."""
    return _peak_or_gap(row) if row["peak_gib"] is not None else str(row["memory_note"]).partition(";")[0]


def _peak_or_gap(row: Row) -> str:
    """With what it adds to the backbone in the same runtime, if that was measured."""
    peak, base = row["peak_gib"], row["base_peak_gib"]
    more = f" ({percent_text(peak / base)})" if peak and base and peak != base else ""
    return digits(peak) + more
