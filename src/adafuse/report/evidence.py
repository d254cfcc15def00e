"""What stands behind the numbers: checks passed and failed, the noise of the timing and what was left out of it,
and every record with its fate.

In: cells and records. Out: the sheets `checks`, `timing` and `records`. Next: calibration.py.
"""

from __future__ import annotations

import math
from collections import Counter
from statistics import median
from typing import Any

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, short_name, title
from adafuse.report.memory import is_timed
from adafuse.report.sheet import Columns, Row, Section, Sheet
from adafuse.report.text import GAP, digits, ratio_text, short
from adafuse.report.timing import again, runtime_of, runtimes
from adafuse.stats import resolution

ABOUT_CHECKS = (
    "An arm is timed only after it has met each of these against the fp32 reference. finite: logits that are NaN or "
    "infinite. logits, whole, padding: relative error of the logits step by step with a cache, of the whole sequence "
    "without one, and behind left padding. greedy: tokens that differ, of those whose two best logits lie further "
    "apart than rounding. routing_*: router logits by which the worst choice misses the reference's top-k on that way. "
    "merged_first, merged: weights against W0 + dW after the first and the last token, relative to dW. restored: "
    "weights that are not bit-identical afterwards. What each is worth stands in the last column; older "
    "records do not say it."
)


def checks(latency: list[Cell]) -> Sheet:
    """Every check of every arm: the worst value over the processes, its bound, and whether all passed."""
    columns: Columns = {
        "arm": lambda row: row["arm"],
        "check": lambda row: row["check"],
        "worst value": lambda row: short(row["value"]),
        "bound": lambda row: short(row["bound"]),
        "passed": lambda row: "yes" if row["passed"] else "no",
        "what it can tell": _can_tell,
    }
    sections = [
        Section(title(cell), caption(cell), rows, columns) for cell in latency if (rows := _checks(cell))
    ]
    return Sheet("checks", "Checks", ABOUT_CHECKS, sections)


def timing(latency: list[Cell]) -> Sheet:
    """How finely each cell can tell two arms of a runtime apart."""
    columns: Columns = {
        "runtime": lambda row: row["runtime"],
        "processes": lambda row: str(row["processes"]),
        "rounds": lambda row: str(row["rounds"]),
        "blocks left out": _left_out_text,
        "A/A ratio [95 %]": lambda row: ratio_text(row["again"], reason="no A/A pair was timed"),
        "resolution": lambda row: GAP if row["resolution"] is None else f"± {100 * row['resolution']:.2g} %",
        "interval": lambda row: row["again"].method if row["again"] else GAP,
    }
    # what a CPU does not tell
    gpu: Columns = {
        "SM MHz": _clock_text,
        "power W": lambda row: digits(row["power_w"]),
        "neighbours": lambda row: (
            GAP if row["foreign_processes"] is None else short(row["foreign_processes"])
        ),
    }
    sections = [
        Section(
            title(cell),
            caption(cell),
            [_timing(cell, runtime) for runtime in runtimes(cell)],
            columns if cell.is_cpu else columns | gpu,
        )
        for cell in latency
        if cell.finished and is_timed(cell)
    ]
    about = (
        "The backbone is timed twice in every round (A/A). A ratio that is no further from 1 than this pair may "
        "be is printed as not resolved. Blocks are left out by rules that do not look at their time "
        "(`src/adafuse/bench/exclusions.py`). Clocks and power are medians over the blocks, with the lowest median of "
        "an arm where it differs; neighbours are other processes on the GPU, at most, during any block."
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


def _can_tell(row: Row) -> str:
    """What a check's detail says beyond what is compared, which is the same in every row."""
    compared, _, beyond = row["detail"].partition("; ")
    return (compared if row["check"] == "greedy" and beyond else beyond) or GAP


def _size(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.inf


def _timing(cell: Cell, runtime: str) -> Row:
    noise = again(cell, runtime)
    arms = [arm for arm in cell.config["arms"]["run"] if runtime_of(cell, arm) == runtime]
    blocks = [line for _, line in cell.of("block") if line["arm"] in arms]
    flagged = [line for _, line in cell.of("flag") if line["arm"] in arms]
    counts = [len(rounds.filter(items=arms).dropna(how="all")) for rounds in cell.rounds.values()]
    reasons = [line["excluded"] for line in blocks if line["excluded"] is not None]
    return {
        "runtime": runtime,
        "processes": sum(count > 0 for count in counts),
        "rounds": sum(counts),
        "blocks": len(blocks),
        "excluded": len(reasons),
        "flagged": len(flagged),
        "left_out": _causes(reasons + [line["reason"] for line in flagged]),
        "again": noise,
        "resolution": math.expm1(resolution(noise)) if noise else None,
        "sm_mhz": _median(blocks, "sm_mhz"),
        "sm_mhz_lowest_arm": min(
            (mhz for arm in arms if (mhz := _median(blocks, "sm_mhz", arm)) is not None), default=None
        ),
        "power_w": _median(blocks, "power_w"),
        "foreign_processes": max(_told(blocks, "foreign_processes"), default=None),
        "records": [short_name(record) for record in cell.finished],
    }


def _causes(reasons: list[str]) -> str:
    """How many blocks each cause took, the commonest first; details come after a colon and stay in the record."""
    counts = Counter(reason.partition(":")[0] for reason in reasons)
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())


def _told(blocks: list[dict[str, Any]], name: str, arm: str | None = None) -> list[float]:
    """A value of the state of every block that has it; older records lack the newer ones."""
    chosen = [line["state"] for line in blocks if arm in (None, line["arm"])]
    return [state[name] for state in chosen if state.get(name) is not None]


def _median(blocks: list[dict[str, Any]], name: str, arm: str | None = None) -> float | None:
    known = _told(blocks, name, arm)
    return median(known) if known else None


def _left_out_text(row: Row) -> str:
    count = f"{row['excluded'] + row['flagged']} of {row['blocks']}"
    return f"{count} ({row['left_out']})" if row["left_out"] else count


def _clock_text(row: Row) -> str:
    usual, lowest = row["sm_mhz"], row["sm_mhz_lowest_arm"]
    return digits(usual) if usual == lowest else f"{digits(usual)} (lowest arm {digits(lowest)})"


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
