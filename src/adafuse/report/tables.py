"""The latency tables: the paper's Tables 1, 5 and 6 beside ours, and the attribution that it lacks.

In: latency cells and the paper's numbers. Out: one `Sheet` each, a section for each cell; a cell of a table
that cannot be filled says why. Next: accuracy.py for Tables 2 to 4, evidence.py for checks, timing and
records.
"""

from __future__ import annotations

from typing import Any

from adafuse.report.cells import Cell, caption, title
from adafuse.report.paper import by_arm, notes
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, count_text, digits, percent_text, ratio_text
from adafuse.report.timing import AGAIN, BASE, EAGER, GEMV, ArmResult, Comparison, cells_for, results

RATIO = "ratio to backbone [95 %]"
GEMV_RATIO = "ratio to backbone (our GEMV) [95 %]"
CAPTURED = (
    "Each ratio is to the plain backbone in the same runtime. Strategy fused is built on a matrix-vector product of "
    "our own, which may beat the library's: its second ratio is to the backbone through that product."
)


def table1(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """Inference cost: time, parameters and multiply-accumulates per token."""
    columns: Columns = {
        "method": _label,
        "ms/token": _ms,
        RATIO: _ratio,
        "paper's ratio": lambda row: _times(row["paper_ratio"]),
        "parameters": lambda row: count_text(row["params"], row["base_params"]),
        "paper's parameters": lambda row: _billions(row["paper_params_b"], row["paper_base_params_b"]),
        "MACs/token": lambda row: count_text(row["macs"], row["base_macs"]),
        "paper's MACs": lambda row: _billions(row["paper_macs_g"], row["paper_base_macs_g"]),
        "paper's ms": lambda row: _printed(row["paper_ms_per_token"]),
    }
    about = "Backbone and dynamic adapters: what one decoded token costs. Ratios are paired by round."
    return _against_paper("table1", "Table 1: inference cost", about, columns, latency, paper)


def table5(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """Latency and peak memory."""
    columns: Columns = {
        "method": _label,
        "ms/token": _ms,
        RATIO: _ratio,
        "paper's ratio": lambda row: _times(row["paper_ratio"]),
        "weights GiB": lambda row: digits(row["weights_gib"]),
        "peak GiB": _peak,
        "paper's GiB": lambda row: _gib(row["paper_peak_gib"], row["paper_base_peak_gib"]),
        "paper's ms": lambda row: _printed(row["paper_ms_per_token"]),
    }
    about = "Time per decoded token and peak device memory of each method."
    return _against_paper("table5", "Table 5: latency and peak memory", about, columns, latency, paper)


def table6(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """The paper's only ablation: merging, then one gate, then one launch."""
    columns: Columns = {
        "method": _label,
        "ms/token": _ms,
        RATIO: _ratio,
        "paper's ratio": lambda row: _times(row["paper_ratio"]),
        "paper's ms": lambda row: _printed(row["paper_ms_per_token"]),
    }
    about = "From adapters called one by one to one merging step per token."
    return _against_paper("table6", "Table 6: latency ablation", about, columns, latency, paper)


def attribution(latency: list[Cell], paper: dict[str, Any]) -> Sheet:
    """Where the gain comes from: every routing under every strategy that was run."""
    rows = {row["arm"] for name in ("table1", "table5", "table6") for row in paper[name]["rows"]} | {AGAIN}
    others = [cell for cell in latency if set(cell.config["arms"]["run"]) - rows]
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
        "time / floor": lambda row: digits(row["over_floor"]),
    }
    rows = [_row(cell, result) | _runtime_part(result) for result in found]
    captured = any(result.runtime != EAGER for result in found)
    return Section(title(cell), caption(cell), rows, columns, [CAPTURED] if captured else [])


def _runtime_part(result: ArmResult) -> Row:
    gemv = result.to_gemv
    return {"runtime": result.runtime, "gemv_ratio": gemv.ratio if gemv else None, "_to_gemv": gemv}


def _against_paper(
    name: str, heading: str, about: str, columns: Columns, latency: list[Cell], paper: dict[str, Any]
) -> Sheet:
    table = paper[name]
    arms = [row["arm"] for row in table["rows"]]
    sections = []
    for cell in cells_for(latency, arms):
        found = results(cell, arms)
        rows = [_row(cell, found[arm], found[BASE]) | _paper_row(table, arm) for arm in arms]
        sections.append(Section(title(cell), caption(cell), rows, columns, notes(table, paper)))
    return Sheet(name, heading, about, sections or [_not_run(table["experiment"])])


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
    }
    row |= {name: result.cost.get(name) for name in ("params", "macs", "floor_ms")}
    row |= {name: result.memory.get(name) for name in ("weights_gib", "peak_gib")}
    row["memory_note"] = result.memory.get("note") or result.reason or "not in the record"
    row["over_floor"] = result.ms_per_token / floor_ms if result.ms_per_token and floor_ms else None
    row |= {f"base_{name}": base.cost.get(name) for name in ("params", "macs")} if base else {}
    return row | {"records": result.files}


def _paper_row(table: dict[str, Any], arm: str) -> Row:
    """The printed numbers of this row and of the backbone's row; nothing where the paper has none."""
    rows = by_arm(table)
    found: Row = {"paper_ratio": rows[arm]["ms_per_token"] / rows[BASE]["ms_per_token"]}
    for name in table["columns"]:
        found |= {f"paper_{name}": rows[arm].get(name), f"paper_base_{name}": rows[BASE].get(name)}
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


def _peak(row: Row) -> str:
    return digits(row["peak_gib"]) if row["peak_gib"] is not None else str(row["memory_note"])


def _times(value: float) -> str:
    return "1" if value == 1 else f"{digits(value)} ({percent_text(value)})"


def _printed(value: float | None) -> str:
    return GAP if value is None else str(value)


def _billions(value: float, base: float) -> str:
    return f"{value} G" if value == base else f"{value} G ({percent_text(value / base)})"


def _gib(value: float, base: float) -> str:
    return str(value) if value == base else f"{value} ({percent_text(value / base)})"
