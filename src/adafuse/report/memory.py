"""Which memory measurement belongs to which latency cell, and what it says about an arm.

In: latency cells and records of any task. Out: the cells, each with the memory records of its workload, and for an arm
one line with the files it came from. Memory is measured one arm a process, so it is joined by backbone, experts, batch,
context and machine, and by what the arm is; the set of arms has no part in it. Next: timing.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from adafuse.records import Record
from adafuse.report.cells import Cell, cells, first_error, short_name
from adafuse.report.pooling import arm_key, workload_key

# what conf/experiment/table5.yaml goes through
OF_TABLE5 = ("base", "mola_loop", "pesc_loop", "moral_loop", "adafuse_switch")
SIZES = ("weights_gib", "peak_gib", "peak_load_gib", "process_gib", "reserved_gib")


def with_memory(latency: list[Cell], records: list[Record]) -> list[Cell]:
    """The latency cells with the memory that was measured of them; what fits none of them makes cells of its own."""
    measured = [record for record in records if record.run.get("task") == "memory"]
    joined = [dataclasses.replace(cell, memory=_of_cell(cell, measured)) for cell in latency]
    homes = {record.path for cell in joined for record in cell.memory}
    alone = cells([record for record in measured if record.path not in homes], "memory")
    return joined + [dataclasses.replace(cell, memory=cell.records) for cell in alone]


def is_timed(cell: Cell) -> bool:
    """False for a cell of memory records that no latency record stands beside."""
    return bool(cell.records[0].run.get("task") == "latency")


def measured_arms(cell: Cell) -> list[str]:
    """The arms that the memory records are about, in the order of the arms' table."""
    own = {_arm(record) for record in cell.memory}
    known = list(cell.config["arms"].get("table", {}))
    return [arm for arm in known if arm in own]


def of_arm(cell: Cell, arm: str) -> tuple[dict[str, Any], list[str]]:
    """Sizes of an arm in GiB and the memory records behind them; without a peak, `note` says why.

    Of several processes the one with the largest peak counts. What a latency record holds is counted, not measured.
    """
    own = [record for record in cell.memory if _arm(record) == arm]
    finished = [record for record in own if record.status != "unfinished"]
    lines = [line for record in finished for line in record.of("memory")]
    files = [short_name(record) for record in finished]
    if lines:
        return max(lines, key=lambda line: line.get("peak_gib") or line.get("process_gib") or 0.0), files
    counted = next((line for _, line in cell.of("memory") if line["arm"] == arm), {})
    return {
        "weights_gib": counted.get("weights_gib"),
        "peak_gib": None,
        "note": _why_missing(arm, own, finished),
    }, files


def _why_missing(arm: str, own: list[Record], finished: list[Record]) -> str:
    if own and not finished:
        return "unfinished record: run the same command again"
    cure = "experiment=table5" if arm in OF_TABLE5 else f"task=memory arms.run=[{arm}]"
    return first_error(finished) or f"not measured: {cure}"


def _of_cell(cell: Cell, measured: list[Record]) -> tuple[Record, ...]:
    """Of two lengths of a decode, the one that this cell times if it was measured: the cache is part of the peak."""
    key = workload_key(cell.records[0])
    own = [record for record in measured if workload_key(record) == key and _is_same_arm(cell, record)]
    same = [record for record in own if _tokens(record.run["config"]) == _tokens(cell.config)]
    return tuple(same or own)


def _is_same_arm(cell: Cell, record: Record) -> bool:
    arm = _arm(record)
    return arm_key(cell.config, arm) == arm_key(record.run["config"], arm)


def _arm(record: Record) -> str:
    return str(record.run["config"]["arms"]["run"][0])


def _tokens(config: dict[str, Any]) -> Any:
    return config.get("latency", {}).get("block_tokens")
