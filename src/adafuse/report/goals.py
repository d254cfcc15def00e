"""Our own goals, written out, and how far each is met.

In: latency and kernel cells. Out: the sheet `goals`, a section for each GPU; a CPU has none. Next:
goals_measured.py, which looks the answers up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adafuse.report.cells import Cell
from adafuse.report.claims_latency import PAPER_GAIN
from adafuse.report.goals_measured import Measured, bandwidth, cost, gain, worst_line
from adafuse.report.memory import is_timed
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits, ratio_text

Sense = Literal["at_most", "at_least"]
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class CostGoal:
    """A token through `arm` costs at most `bound` times the plain backbone's, in graph or compiled."""

    arm: str
    text: str
    rank: int
    batch: int
    bound: float
    sense: Sense = "at_most"
    unit: str = ""


@dataclass(frozen=True)
class KernelGoal:
    """A bound on `field` of the lines of a kernel; `where` narrows them, without it every size counts."""

    kernel: str
    text: str
    field: str
    bound: float
    sense: Sense
    unit: str
    where: tuple[tuple[str, Any], ...] = ()
    # milliseconds are of one card: on others the goal is not shown
    card: str = ""


@dataclass(frozen=True)
class GainGoal:
    """The fastest of `slow` takes at least `bound` times as long as `fast`, eager, batch 1."""

    slow: tuple[str, ...]
    fast: str
    text: str
    rank: int
    bound: float
    batch: int = 1
    sense: Sense = "at_least"
    unit: str = ""


@dataclass(frozen=True)
class BandwidthGoal:
    """The plain backbone reads at least `bound` of the measured read bandwidth in graph or compiled, batch 1."""

    text: str
    rank: int
    bound: float
    batch: int = 1
    sense: Sense = "at_least"
    unit: str = "%"


Goal = CostGoal | KernelGoal | GainGoal | BandwidthGoal

LOOPS = ("mola_loop", "moral_loop", "pesc_loop", "mixlora_loop")
WHOLE = (("model", "llama2_7b"), ("targets", "all"), ("rank", 16))
GOALS: list[Goal] = [
    BandwidthGoal("plain backbone, batch 1: share of read bandwidth", 16, 0.80),
    CostGoal("adafuse_gather", "AdaFuse (gather), rank 16, batch 1", 16, 1, 1.05),
    CostGoal("adafuse_gather", "AdaFuse (gather), rank 16, batch 8", 16, 8, 1.08),
    CostGoal("adafuse_gather", "AdaFuse (gather), rank 16, batch 32", 16, 32, 1.10),
    CostGoal("adafuse_fused", "AdaFuse (fused), rank 16, batch 1", 16, 1, 1.05),
    CostGoal("adafuse_gather", "AdaFuse (gather), rank 64, batch 1", 64, 1, 1.16),
    CostGoal("adafuse_gather", "AdaFuse (gather), rank 64, batch 8", 64, 8, 1.20),
    CostGoal("adafuse_gather", "AdaFuse (gather), rank 64, batch 32", 64, 32, 1.30),
    KernelGoal("switch", "switch kernel alone, rank 16", "ms", 7.2, "at_most", "ms", WHOLE, "H200"),
    KernelGoal(
        "switch", "switch kernel, every shape: share of copy bandwidth", "share", 0.85, "at_least", "%"
    ),
    GainGoal(LOOPS, "adafuse_switch", "eager: fastest other adapter over AdaFuse (switch)", 16, PAPER_GAIN),
]
EXPERIMENTS = ("graph", "graph_batch", "compiled", "kernels", "table1")
ABOUT = (
    "Goals that we set ourselves (`src/adafuse/report/goals.py`), on a GPU: the shape of Llama-2-7B, "
    "bfloat16, top-2 of 8 experts on all seven linears, context 128 (the paper's eager rows: any). A ratio is to the "
    "plain backbone in the same runtime; the better of graph and compiled counts. Met or missed goes by the measured "
    "value; where its interval holds the bound, that is said."
)


def sheet(latency: list[Cell], kernels: list[Cell]) -> Sheet:
    """Every goal on every GPU that has records."""
    sections = [_section(*found) for found in gpus(latency, kernels).values()]
    names = ", ".join(f"experiment={name}" for name in EXPERIMENTS)
    reason = f"not run in this profile (the goals are about a GPU): {names}"
    return Sheet("goals", "Our own goals", ABOUT, sections or [nothing(reason)])


def gpus(latency: list[Cell], kernels: list[Cell]) -> dict[tuple[str, ...], tuple[list[Cell], list[Cell]]]:
    """The latency and kernel cells that have finished records, by machine; none of a CPU."""
    found: dict[tuple[str, ...], tuple[list[Cell], list[Cell]]] = {}
    for index, cells in enumerate((latency, kernels)):
        for cell in cells:
            if cell.finished and not cell.is_cpu and (cell in kernels or is_timed(cell)):
                key = tuple(str(cell.machine.get(name)) for name in ("gpu", "cpu", "name"))
                found.setdefault(key, ([], []))[index].append(cell)
    return dict(sorted(found.items()))


def _section(latency: list[Cell], kernels: list[Cell]) -> Section:
    columns: Columns = {
        "goal": lambda row: row["goal"],
        "bound": lambda row: row["bound_text"],
        "ours [95 %]": lambda row: row["ours"],
        "verdict": lambda row: f"**{row['verdict']}**",
        "measured": lambda row: row["measured"],
    }
    machine = (latency or kernels)[0].machine
    here = [goal for goal in GOALS if getattr(goal, "card", "") in str(machine["gpu"])]
    rows = [_row(goal, latency, kernels) for goal in here]
    return Section(f"{machine['gpu']} · {machine.get('cpu')}", "", rows, columns)


def _row(goal: Goal, latency: list[Cell], kernels: list[Cell]) -> Row:
    found = _measure(goal, latency, kernels)
    sign = "≤" if goal.sense == "at_most" else "≥"
    return {
        "goal": goal.text,
        "bound": goal.bound,
        "bound_text": f"{sign} {_shown(goal, goal.bound)}",
        "value": found.value,
        "ratio": found.interval,
        "ours": ratio_text(found.interval) if found.interval else _shown(goal, found.value),
        "verdict": _verdict(goal, found),
        "measured": found.said,
        "records": found.files,
    }


def _measure(goal: Goal, latency: list[Cell], kernels: list[Cell]) -> Measured:
    if isinstance(goal, CostGoal):
        return cost(latency, goal.arm, goal.rank, goal.batch)
    if isinstance(goal, GainGoal):
        return gain(latency, goal.slow, goal.fast, goal.rank, goal.batch)
    if isinstance(goal, BandwidthGoal):
        return bandwidth(latency, goal.rank, goal.batch)
    return worst_line(kernels, goal.kernel, goal.field, goal.sense == "at_most", dict(goal.where))


def _verdict(goal: Goal, found: Measured) -> str:
    """By the measured value; an interval that holds the bound is named."""
    if found.failed:
        return f"{MISSED}: a line has no time"
    if found.value is None:
        return NOT_MEASURED
    beyond = found.value - goal.bound if goal.sense == "at_most" else goal.bound - found.value
    ends = found.interval
    doubt = ", but the interval holds the bound" if ends and ends.low <= goal.bound <= ends.high else ""
    if beyond <= 0:
        return MET + doubt
    points = f"{100 * beyond:.2g} points" if goal.unit == "%" else f"{beyond:.2g} {goal.unit}".strip()
    return f"{MISSED} by {points}{doubt}"


def _shown(goal: Goal, value: float | None) -> str:
    if value is None:
        return GAP
    return f"{100 * value:.1f} %" if goal.unit == "%" else f"{digits(value)} {goal.unit}".strip()
