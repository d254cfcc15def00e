"""What merging in place does to the weights: errors after so many switches, as a table and as a figure.

In: drift records. Out: a `Trace` for each strategy and dtype, the sheet `drift` and its figure. Next: figures.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, cells, short_name, title, why_empty
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.style import FAINT, PALE, STRATEGIES, canvas, source_line
from adafuse.report.text import GAP, digits, short

STRATEGY_ORDER = ("switch", "switch_refresh", "rebase")
LABEL = {"switch": "switch", "switch_refresh": "switch, refreshed", "rebase": "rebase"}
# field of a line: what it is called
QUANTITIES = {
    "weight_error": "weight error",
    "delta_error": "error / delta",
    "logit_error": "logit error",
    "agreement": "greedy agreement",
}
MARKS = {"bfloat16": ("-", "o"), "float16": ("--", "s"), "float32": (":", "^")}
ABOUT = (
    "Errors after so many changes of experts, against weights merged once in fp32: of the weights, of the same in "
    "units of what is merged in, of the logits; and how often the greedy token is the same."
)


@dataclass(frozen=True)
class Trace:
    """One strategy in one dtype: by number of switches, the median over the records of each quantity."""

    strategy: str
    dtype: str
    switches: tuple[int, ...]
    values: dict[str, list[float | None]]
    identical: tuple[bool, ...]
    delta_share: float | None
    files: tuple[str, ...]


def drift_cells(records: list[Record]) -> list[Cell]:
    """The drift cells among `records`; dtypes share one."""
    return cells(records, "drift")


def traces(cell: Cell) -> list[Trace]:
    """Every strategy and dtype of the finished records, by dtype, the literal switch first."""
    keys = {(line["dtype"], line["strategy"]) for _, line in cell.of("drift")}
    return [_trace(cell, *key) for key in sorted(keys, key=lambda key: (key[0], _rank(key[1])))]


def drift_table(drift: list[Cell]) -> Sheet:
    """Each quantity over the number of switches."""
    sections = [_section(cell) for cell in drift] or [nothing("not run in this profile: experiment=drift")]
    return Sheet("drift", "Drift of merging in place", ABOUT, sections)


def drift_figure(cell: Cell) -> Figure:
    """Weight error and logit error over switches, one line for each strategy and dtype."""
    # by strategy, so that a column of the legend is one strategy
    found = sorted(traces(cell), key=lambda trace: _rank(trace.strategy))
    figure, panels = canvas(7.2, 3.7, 2)
    for axis, name in zip(panels, ("weight_error", "logit_error"), strict=True):
        for trace in found:
            _line(axis, trace, name)
        _frame(axis, name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    source_line(figure, title(cell))
    return figure


def _section(cell: Cell) -> Section:
    found = traces(cell)
    if not found:
        return nothing(why_empty(cell, "drift"), title(cell), caption(cell))
    columns: Columns = {
        "strategy": lambda row: row["strategy"],
        "dtype": lambda row: row["dtype"],
        "delta / weight": lambda row: digits(row["delta_share"]),
        "quantity": lambda row: QUANTITIES[row["quantity"]],
    }
    for count in sorted({count for trace in found for count in trace.switches}):
        columns[f"t = {count}"] = lambda row, key=f"t{count}": _value(row, key)  # type: ignore[misc]
    columns["weights as after t = 1"] = lambda row: row["identical"]
    rows = [row for trace in found for row in _rows(trace)]
    return Section(title(cell), caption(cell), rows, columns)


def _rows(trace: Trace) -> list[Row]:
    head = {"strategy": trace.strategy, "dtype": trace.dtype, "delta_share": trace.delta_share}
    tail = {"identical": _identical(trace), "records": list(trace.files)}
    return [
        head
        | {"quantity": name}
        | {f"t{count}": value for count, value in zip(trace.switches, trace.values[name], strict=True)}
        | tail
        for name in QUANTITIES
    ]


def _identical(trace: Trace) -> str:
    """Bit for bit, at every measured number of switches."""
    wrong = [count for count, same in zip(trace.switches, trace.identical, strict=True) if not same]
    return "identical" if not wrong else f"differ from t = {wrong[0]}"


def _value(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return GAP
    return f"{100 * value:.1f} %" if row["quantity"] == "agreement" else short(value)


def _trace(cell: Cell, dtype: str, strategy: str) -> Trace:
    own = [(r, x) for r, x in cell.of("drift") if (x["dtype"], x["strategy"]) == (dtype, strategy)]
    by_count: dict[int, list[dict[str, Any]]] = {}
    for _, line in own:
        by_count.setdefault(line["switches"], []).append(line)
    counts = tuple(sorted(by_count))
    return Trace(
        strategy=strategy,
        dtype=dtype,
        switches=counts,
        values={name: [_median(by_count[count], name) for count in counts] for name in QUANTITIES},
        identical=tuple(all(line.get("identical") for line in by_count[count]) for count in counts),
        delta_share=_median([line for _, line in own], "delta_share"),
        files=tuple(dict.fromkeys(short_name(record) for record, _ in own)),
    )


def _median(found: list[dict[str, Any]], name: str) -> float | None:
    """None where a value was not finite in any record: a median of the rest would hide it."""
    values = [float(line[name]) for line in found if line.get(name) is not None]
    return float(np.median(values)) if len(values) == len(found) else None


def _line(axis: Axes, trace: Trace, name: str) -> None:
    values = [value if value else np.nan for value in trace.values[name]]
    style, mark = MARKS.get(trace.dtype, ("-", "o"))
    axis.plot(
        trace.switches,
        values,
        color=STRATEGIES.get(trace.strategy, FAINT),
        linestyle=style,
        marker=mark,
        markersize=3.5,
        linewidth=1.4,
        label=f"{LABEL.get(trace.strategy, trace.strategy)}, {trace.dtype}",
    )


def _frame(axis: Axes, name: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(QUANTITIES[name].capitalize())
    axis.set_xlabel("switches")
    axis.set_ylabel(
        "share of the norm of the weights" if name == "weight_error" else "share of the largest logit"
    )
    axis.grid(True, color=PALE, linewidth=0.6)


def _rank(strategy: str) -> tuple[int, str]:
    known = strategy in STRATEGY_ORDER
    return (STRATEGY_ORDER.index(strategy) if known else len(STRATEGY_ORDER)), strategy
