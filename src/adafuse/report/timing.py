"""What a latency cell says about each arm: its time, its ratio to the backbone, the check it passed, its cost and
memory, or why there is no time.

In: a `Cell` of latency records. Out: `ArmResult` by arm, and ratios between any two arms. An arm is compared with
the plain backbone in its own runtime, so that no adapter gets the credit for a CUDA graph. Next: tables.py,
claims.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adafuse.records import Record
from adafuse.report import memory
from adafuse.report.cells import Cell, base_key, cells, first_error, short_name, why_empty
from adafuse.report.text import short
from adafuse.stats import Interval, is_resolved, paired_ratio

EAGER = "eager"
RUNTIMES = (EAGER, "graph", "compiled")
BASE, AGAIN = "base", "base_again"
# The plain backbone through the matrix-vector product that strategy fused is built on.
GEMV = "base_gemv"


@dataclass(frozen=True)
class Comparison:
    """An arm over a backbone arm; `reason` says why there is no ratio."""

    base: str
    ratio: Interval | None
    resolved: bool
    reason: str | None


@dataclass
class ArmResult:
    """One arm of one cell; `reason` says why there is no time, sizes are totals with the backbone."""

    arm: str
    label: str
    runtime: str
    strategy: str | None
    ms_per_token: float | None
    to_base: Comparison
    # only for strategy fused
    to_gemv: Comparison | None
    reason: str | None
    cost: dict[str, Any]
    # measured apart if it was, else what the latency record counts
    memory: dict[str, Any]
    # the one that decides: a failed one, else the passed one that came nearest to its bound
    check: dict[str, Any] | None
    # of the bandwidth that was measured in the same processes
    bandwidth_share: float | None
    files: list[str]

    @property
    def ratio(self) -> Interval | None:
        """Over the plain backbone in the same runtime."""
        return self.to_base.ratio

    @property
    def resolved(self) -> bool:
        return self.to_base.resolved


def runtime_of(cell: Cell, arm: str) -> str:
    """How the arm's step is launched; records from before there was a choice are eager."""
    return str(_arm(cell, arm).get("runtime", EAGER))


def runtimes(cell: Cell) -> list[str]:
    """The runtimes among the arms that the cell was to run."""
    held = {runtime_of(cell, arm) for arm in cell.config["arms"]["run"]}
    return [runtime for runtime in RUNTIMES if runtime in held]


def base_of(runtime: str, base: str = BASE) -> str:
    """The arm of the plain backbone in a runtime: base, base_graph, base_compiled."""
    return base if runtime == EAGER else f"{base}_{runtime}"


def again_of(runtime: str) -> str:
    """The A/A arm of a runtime."""
    return f"{base_of(runtime)}_again"


def latency_cells(records: list[Record]) -> list[Cell]:
    """The latency cells among `records`, one for each set of arms, with their memory; last, memory of no such cell."""
    return memory.with_memory(cells(records, "latency"), records)


def cells_for(latency: list[Cell], arms: list[str]) -> list[Cell]:
    """Of the cells that differ only in their arms, the one that holds most of `arms`.

    A cell with fewer than two adapters among them (a scan with arms of its own) is shown only if there is no
    other.
    """
    best: dict[str, Cell] = {}
    for cell in filter(memory.is_timed, latency):
        key = base_key(cell)
        if key not in best or _held(cell, arms) > _held(best[key], arms):
            best[key] = cell
    held = {key: _held(cell, [arm for arm in arms if arm != BASE]) for key, cell in best.items()}
    least = 2 if max(held.values(), default=0) >= 2 else 1
    return [cell for key, cell in best.items() if held[key] >= least]


def ratio(cell: Cell, arm: str, base: str | None = None) -> Interval | None:
    """Time of `arm` over time of `base` (left out: the plain backbone in the arm's runtime), paired by round within
    each process; None if no process has both.
    """
    base = base or base_of(runtime_of(cell, arm))
    pairs = []
    for rounds in cell.rounds.values():
        if arm in rounds and base in rounds:
            both = rounds[[arm, base]].dropna() if arm != base else rounds[[arm]].dropna()
            if len(both):
                pairs.append((both[arm].to_numpy(), both[base].to_numpy()))
    return paired_ratio(pairs) if pairs else None


def again(cell: Cell, runtime: str = EAGER) -> Interval | None:
    """The A/A arm of a runtime: the backbone over itself."""
    return ratio(cell, again_of(runtime), base_of(runtime))


def results(cell: Cell, arms: list[str] | None = None) -> dict[str, ArmResult]:
    """One result for each of `arms`, or for every arm that the cell was to run."""
    noise = {runtime: again(cell, runtime) for runtime in RUNTIMES}
    return {arm: _result(cell, arm, noise) for arm in arms or cell.config["arms"]["run"]}


def missing(cell: Cell, arm: str) -> str:
    """Why an arm has no time."""
    if not memory.is_timed(cell):
        return "no latency record of this cell"
    if not cell.finished:
        return why_empty(cell, "block")
    if arm not in cell.config["arms"]["run"]:
        return f"not run: arm is not in arms={cell.config['arms'].get('name')}"
    check = decisive_check(cell, arm)
    if check and not check["passed"]:
        return f"check failed: {check['check']} {short(check['value'])}, bound {short(check['bound'])}"
    named = first_error(cell.finished, arm)
    if named:
        return named
    excluded = [line["excluded"] for _, line in cell.of("block") if line["arm"] == arm and line["excluded"]]
    if excluded:
        return f"every block excluded: {excluded[0]}"
    return first_error(cell.finished) or "not in the record"


def decisive_check(cell: Cell, arm: str) -> dict[str, Any] | None:
    """Of all processes: the first check that failed, else the one that came nearest to its bound."""
    checks = [line for _, line in cell.of("check") if line["arm"] == arm]
    failed = next((line for line in checks if not line["passed"]), None)
    # where nothing at all may differ the bound is 0, and a check that passed came no nearer than any other
    return failed or max(
        checks, key=lambda line: line["value"] / line["bound"] if line["bound"] else 0, default=None
    )


def bandwidth_share(cell: Cell, cost: dict[str, Any], ms_per_token: float | None) -> float | None:
    """Bytes that a token needs, over its time, over the measured read bandwidth."""
    read_gbps = [line["read_gbps"] for _, line in cell.of("calibration") if line["read_gbps"]]
    if not (read_gbps and ms_per_token and cost.get("bytes_per_token")):
        return None
    return float(cost["bytes_per_token"] / (ms_per_token * 1e-3) / (np.median(read_gbps) * 1e9))


def _result(cell: Cell, arm: str, noise: dict[str, Interval | None]) -> ArmResult:
    per_process = _medians(cell, arm)
    known, runtime = _arm(cell, arm), runtime_of(cell, arm)
    own = noise.get(runtime)
    fused = known.get("strategy") == "fused"
    ms_per_token = float(np.median(per_process)) if per_process else None
    cost = _cost(cell, arm)
    sizes, memory_files = memory.of_arm(cell, arm)
    files = [short_name(r) for r in cell.finished if _mentions(r, arm)]
    return ArmResult(
        arm=arm,
        label=known.get("label", arm),
        runtime=runtime,
        strategy=known.get("strategy"),
        ms_per_token=ms_per_token,
        to_base=_compare(cell, arm, base_of(runtime), own),
        to_gemv=_compare(cell, arm, base_of(runtime, GEMV), own) if fused else None,
        reason=None if per_process else missing(cell, arm),
        cost=cost,
        memory=sizes,
        check=decisive_check(cell, arm),
        bandwidth_share=bandwidth_share(cell, cost, ms_per_token),
        files=list(dict.fromkeys([*files, *memory_files])),
    )


def _compare(cell: Cell, arm: str, base: str, noise: Interval | None) -> Comparison:
    found = ratio(cell, arm, base)
    if found is not None:
        return Comparison(base, found, is_resolved(found, noise), None)
    absent = next((name for name in (arm, base) if not _medians(cell, name)), None)
    reason = (
        f"no time of {absent} ({missing(cell, absent)})" if absent else f"no round holds {arm} and {base}"
    )
    return Comparison(base, None, False, reason)


def _medians(cell: Cell, arm: str) -> list[float]:
    """Of each process that timed the arm."""
    return [float(rounds[arm].dropna().median()) for rounds in cell.rounds.values() if arm in rounds]


def _arm(cell: Cell, arm: str) -> dict[str, Any]:
    return dict(cell.config["arms"].get("table", {}).get(arm, {}))


def _cost(cell: Cell, arm: str) -> dict[str, Any]:
    """Counts are alike in all processes; the floor follows each one's own bandwidth, so its median is taken."""
    lines = [line for _, line in cell.of("cost") if line["arm"] == arm]
    if not lines:
        return {}
    return lines[0] | {"floor_ms": float(np.median([line["floor_ms"] for line in lines]))}


def _mentions(record: Record, arm: str) -> bool:
    return any(line.get("arm") == arm for line in record.lines)


def _held(cell: Cell, arms: list[str]) -> int:
    return len(set(arms) & set(cell.config["arms"]["run"]))
