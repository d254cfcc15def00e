"""What stands behind the numbers: checks passed and failed, the noise of the timing, and every record with
its fate.

In: cells and records. Out: the sheets `checks`, `timing` and `records`. Next: layers.py.
"""

from __future__ import annotations

import math
from typing import Any

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, short_name, title
from adafuse.report.sheet import Columns, Row, Section, Sheet
from adafuse.report.text import GAP, digits, ratio_text, short
from adafuse.report.timing import again, runtime_of, runtimes
from adafuse.stats import resolution


def checks(latency: list[Cell]) -> Sheet:
    """Every check of every arm: the worst value over the processes, its bound, and whether all passed."""
    columns: Columns = {
        "arm": lambda row: row["arm"],
        "check": lambda row: row["check"],
        "worst value": lambda row: short(row["value"]),
        "bound": lambda row: short(row["bound"]),
        "passed": lambda row: "yes" if row["passed"] else f"no: {row['detail']}".rstrip(": "),
    }
    sections = [
        Section(title(cell), caption(cell), rows, columns) for cell in latency if (rows := _checks(cell))
    ]
    about = "An arm is timed only after it has met each of these against the fp32 reference."
    return Sheet("checks", "Checks", about, sections)


def timing(latency: list[Cell]) -> Sheet:
    """How finely each cell can tell two arms of a runtime apart."""
    columns: Columns = {
        "runtime": lambda row: row["runtime"],
        "processes": lambda row: str(row["processes"]),
        "rounds": lambda row: str(row["rounds"]),
        "blocks left out": lambda row: f"{row['excluded']} of {row['blocks']}",
        "A/A ratio [95 %]": lambda row: ratio_text(row["again"], reason="no A/A pair was timed"),
        "resolution": lambda row: GAP if row["resolution"] is None else f"± {100 * row['resolution']:.2g} %",
        "interval": lambda row: row["again"].method if row["again"] else GAP,
        "read GB/s": lambda row: digits(row["read_gbps"]),
        "copy GB/s": lambda row: digits(row["copy_gbps"]),
    }
    sections = [
        Section(title(cell), caption(cell), [_timing(cell, runtime) for runtime in runtimes(cell)], columns)
        for cell in latency
        if cell.finished
    ]
    about = (
        "The backbone is timed twice in every round (A/A). A ratio that is no further from 1 than this pair may "
        "be is printed as not resolved."
    )
    return Sheet("timing", "Timing resolution", about, sections)


def all_records(records: list[Record]) -> Sheet:
    """Every record with its status; failed and unfinished ones too."""
    columns: Columns = {
        "record": lambda row: f"`{row['record']}`",
        "task": lambda row: str(row["task"]),
        "profile": lambda row: str(row["profile"]),
        "commit": lambda row: str(row["commit"] or "unknown")[:12] + (" (dirty)" if row["dirty"] else ""),
        "status": lambda row: row["status"],
        "seconds": lambda row: digits(row["seconds"]),
        "peak RSS GiB": lambda row: digits(row["peak_rss_gib"]),
        "first error": lambda row: row["error"] or GAP,
    }
    rows = [_record(record) for record in records]
    return Sheet(
        "records",
        "Records",
        "Every file that this report was drawn from.",
        [Section("All", "", rows, columns)],
    )


def _checks(cell: Cell) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for record, line in cell.of("check"):
        row = rows.setdefault((line["arm"], line["check"]), {**line, "records": []})
        row.pop("kind", None)
        row["records"].append(short_name(record))
        if not line["passed"] or (row["passed"] and _size(line["value"]) > _size(row["value"])):
            row |= {name: line[name] for name in ("value", "bound", "passed", "detail")}
    return list(rows.values())


def _size(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.inf


def _timing(cell: Cell, runtime: str) -> Row:
    noise = again(cell, runtime)
    arms = [arm for arm in cell.config["arms"]["run"] if runtime_of(cell, arm) == runtime]
    blocks = [line for _, line in cell.of("block") if line["arm"] in arms]
    counts = [len(rounds.filter(items=arms).dropna(how="all")) for rounds in cell.rounds.values()]
    calibrations = [line for _, line in cell.of("calibration")]
    row: Row = {
        "runtime": runtime,
        "processes": sum(count > 0 for count in counts),
        "rounds": sum(counts),
        "blocks": len(blocks),
        "excluded": sum(line["excluded"] is not None for line in blocks),
        "again": noise,
        "resolution": math.expm1(resolution(noise)) if noise else None,
    }
    for name in ("read_gbps", "copy_gbps"):
        known = [line[name] for line in calibrations if line.get(name) is not None]
        row[name] = sum(known) / len(known) if known else None
    return row | {"records": [short_name(record) for record in cell.finished]}


def _record(record: Record) -> Row:
    end = record.lines[-1] if record.status != "unfinished" else {}
    errors = record.of("error")
    return {
        "record": short_name(record),
        **{
            name: record.run.get(name)
            for name in ("task", "cell_id", "profile", "commit", "dirty", "seed", "replicate")
        },
        "status": record.status,
        "seconds": end.get("seconds"),
        "peak_rss_gib": end.get("peak_rss_gib"),
        "error": errors[0]["message"] if errors else None,
        "errors": len(errors),
    }
