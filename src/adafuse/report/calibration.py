"""What each machine was measured to be able to do, beside every cell whose floors stand on it.

In: latency, kernel and layer cells. Out: the sheet `calibration`, a section for each machine and a row for each cell.
Records from before a number was measured have a gap. Next: layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from adafuse.report.cells import Cell, short_name, title
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import digits

# as bench/calibration.py writes them, and what they are called here
NUMBERS = {
    "read_gbps": "read GB/s",
    "copy_gbps": "copy GB/s",
    "rmw_gbps": "in place GB/s",
    "launch_us": "eager launch µs",
}
GPU_NUMBERS = {
    "empty_node_us": "empty node µs",
    "tiny_node_us": "dependent node µs",
    "graph_launch_us": "graph launch µs",
}
ABOUT = (
    "Measured in the same process before anything else, as the floors of what follows; medians over the processes of a "
    "cell. A copy and a rewrite in place count bytes read plus bytes written. A node is one kernel of one program in a "
    "captured CUDA graph of 1000 in a row: empty, or reading and writing one element. Eager launch is one tiny "
    "operation of torch among many; graph launch is the host's time to replay a graph of one node."
)


def sheet(cells: list[Cell]) -> Sheet:
    """Every cell that has a calibration, by machine."""
    machines: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.of("calibration"):
            machines.setdefault(_machine(cell), []).append(cell)
    sections = [_section(heading, own) for heading, own in sorted(machines.items())]
    return Sheet("calibration", "Calibration", ABOUT, sections or [nothing("no record was calibrated")])


def _section(heading: str, cells: list[Cell]) -> Section:
    numbers = NUMBERS if cells[0].is_cpu else NUMBERS | GPU_NUMBERS
    columns: Columns = {
        "task": lambda row: row["task"],
        "cell": lambda row: row["cell"],
        "processes": lambda row: str(row["processes"]),
        **{said: _shown(name) for name, said in numbers.items()},
    }
    return Section(heading, "", [_row(cell) for cell in cells], columns)


def _shown(name: str) -> Callable[[Row], str]:
    return lambda row: digits(row[name])


def _machine(cell: Cell) -> str:
    machine = cell.machine
    parts = [machine.get("gpu"), machine.get("cpu"), f"{machine.get('cores')} cores"]
    return " · ".join(str(part) for part in parts if part)


def _row(cell: Cell) -> Row:
    lines = [line for _, line in cell.of("calibration")]
    row: Row = {
        "task": cell.records[0].run["task"],
        # the machine, first in the title, is the section's heading
        "cell": title(cell).partition(" · ")[2],
        "processes": len(lines),
    }
    for name in NUMBERS | GPU_NUMBERS:
        known = [line[name] for line in lines if line.get(name) is not None]
        row[name] = median(known) if known else None
    return row | {"records": [short_name(record) for record in cell.finished if record.of("calibration")]}
