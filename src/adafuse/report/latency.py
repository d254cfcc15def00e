"""What one decoded token costs: every arm's time beside the plain backbone's, its floor, its checks, its memory, and
how finely it was timed.

In: a `Cell`, records that are replicates of each other. Out: `Measured`, a row for each arm and for each runtime. An
arm is compared with the plain backbone in its own runtime, so that no adapter gets the credit for a CUDA graph; ratios
are paired by round within a process, and processes are the units of an interval. Next: apart.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adafuse.report.frames import Frames, Json, method_settings
from adafuse.report.measurements import Measured, Measurement, RowName
from adafuse.report.naming import ADAFUSE, BASE, EAGER, TWIN, Arm, arms_of
from adafuse.stats import Interval, is_resolved, paired_ratio, resolution

# by arm: ms per token in each round of one process, nan where no block counts
Rounds = dict[str, NDArray[np.float64]]
# lines of one kind, each with its record
Lines = list[tuple[str, Json]]
SIZES = ("weights_gib", "peak_gib", "peak_load_gib", "process_gib", "reserved_gib")
COUNTS = ("params", "macs", "adapter_params", "bytes_per_token")
# what two workloads must agree in for memory that was measured of one to be the other's
WORKLOAD = [
    "folder",
    "model",
    "path",
    "dtype",
    "shape",
    "targets",
    "rank",
    "count",
    "top_k",
    "batch",
    "context",
]
UNFINISHED = "unfinished record: run the same command again"


@dataclass(frozen=True)
class Cell:
    """Records of one task that are replicates of each other, in the order of their names."""

    experiment: str
    key: str
    task: str
    runs: pd.DataFrame
    frames: Frames

    @cached_property
    def finished(self) -> tuple[str, ...]:
        return tuple(self.runs.index[self.runs["status"] != "unfinished"])

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """What any of the records was to run."""
        return {arm: own for _, run in self.runs.iterrows() for arm, own in arms_of(run).items()}

    @cached_property
    def plain(self) -> dict[tuple[str, str], str]:
        """The arms of the bare backbone by runtime and part: base, again (A/A) and gemv, through the product that
        strategy fused is built on.
        """
        found: dict[tuple[str, str], str] = {}
        for arm, own in self.runs.iloc[0]["config"]["arms"].get("table", {}).items():
            if own.get("method") == BASE:
                runtime = own.get("runtime", EAGER)
                part = "again" if (runtime, "base") in found else "base"
                found.setdefault((runtime, "gemv" if own.get("strategy") == "fused" else part), arm)
        return found

    @cached_property
    def rounds(self) -> dict[str, Rounds]:
        """By record: the blocks that count, neither excluded at once nor flagged at the end."""
        times: dict[str, dict[str, dict[int, float]]] = {}
        flagged = {(record, line["arm"], line["round"]) for record, line in self.of("flag")}
        for record, line in self.of("block"):
            if line["excluded"] is None and (record, line["arm"], line["round"]) not in flagged:
                ms = line["block_ms"] / line["tokens"]
                times.setdefault(record, {}).setdefault(line["arm"], {})[line["round"]] = ms
        return {record: _by_round(own) for record, own in times.items()}

    @cached_property
    def memory(self) -> list[pd.Series]:
        """The memory records of this workload, whatever arm they are of."""
        every = self.frames.runs[self.frames.runs["task"] == "memory"]
        first = self.runs.iloc[0]
        return [run for _, run in every.iterrows() if all(run[name] == first[name] for name in WORKLOAD)]

    def of(self, kind: str, arm: str | None = None) -> Lines:
        """Lines of a kind in the finished records, of one arm or of all, each with its record."""
        lines = [(record, line) for record in self.finished for line in self.frames.of(kind, record)]
        return lines if arm is None else [(record, line) for record, line in lines if line["arm"] == arm]

    def value(
        self, row: str, quantity: str, value: float | None, reason: str = "", records: Iterable[str] = ()
    ) -> Measurement:
        """A number without an interval, nan for None; without `records` all of the cell stand behind it."""
        number = math.nan if value is None else float(value)
        own = tuple(dict.fromkeys(records)) or self.finished
        return Measurement(self.experiment, self.key, row, quantity, number, reason=reason, records=own)

    def values(
        self, row: str, numbers: Mapping[str, float | None], records: Iterable[str] = ()
    ) -> list[Measurement]:
        """Numbers without intervals, by quantity."""
        return [self.value(row, quantity, value, records=records) for quantity, value in numbers.items()]

    def interval(self, row: str, quantity: str, found: Interval, records: Iterable[str] = ()) -> Measurement:
        """A ratio with its interval."""
        bare = self.value(row, quantity, found.ratio, found.method, records)
        return replace(bare, low=found.low, high=found.high, n=found.n_processes)


def measure(cell: Cell) -> Measured:
    """Every arm that the cell was to run, and how finely each of its runtimes was timed."""
    found = Measured(rows=row_names(cell))
    runtimes = dict.fromkeys(own.runtime for own in cell.arms.values())
    noise = {runtime: again_ratio(cell, runtime) for runtime in runtimes}
    base_peaks = {runtime: _peak(cell, cell.plain.get((runtime, "base"), "")) for runtime in runtimes}
    for arm, own in cell.arms.items():
        ms_per_token = _time(cell, arm)
        found.values.append(ms_per_token)
        found.values += _ratios(cell, arm, noise[own.runtime])
        found.values += _cost(cell, arm, ms_per_token.value)
        found.values += _checks(cell, arm)
        found.values += memory_values(cell, arm, memory_records(cell, arm))
        found.values += [replace(peak, row=arm, quantity="base_peak_gib") for peak in base_peaks[own.runtime]]
    for runtime, again in noise.items():
        found.values += _timing(cell, runtime, again)
    return found


def row_names(cell: Cell) -> list[RowName]:
    """The arms of a cell with what each is, in the order in which they were asked for."""
    return [RowName(cell.experiment, cell.key, arm, *own) for arm, own in cell.arms.items()]


def ratio(cell: Cell, arm: str, base: str) -> Interval | None:
    """Time of `arm` over time of `base`, paired by round within each process; None if no round has both."""
    pairs = []
    for times in cell.rounds.values():
        if arm in times and base in times:
            both = ~np.isnan(times[arm]) & ~np.isnan(times[base])
            if both.any():
                pairs.append((times[arm][both], times[base][both]))
    return paired_ratio(pairs) if pairs else None


def again_ratio(cell: Cell, runtime: str) -> Interval | None:
    """The A/A arm of a runtime: the backbone over itself."""
    again, base = (cell.plain.get((runtime, part), "") for part in ("again", "base"))
    return ratio(cell, again, base)


def why_no_time(cell: Cell, arm: str) -> str:
    """Why an arm that was asked for has no time."""
    if not cell.finished:
        return UNFINISHED
    if arm not in cell.arms:
        return "not run"
    check = _decisive(cell, arm)
    if check and not check["passed"]:
        value = "none" if check["value"] is None else f"{check['value']:.3g}"
        return f"check failed: {check['check']} {value}, bound {check['bound']:.3g}"
    excluded = [line["excluded"] for _, line in cell.of("block", arm) if line["excluded"]]
    excluding = f"every block excluded: {excluded[0]}" if excluded else ""
    return error_of(cell, arm) or excluding or error_of(cell) or "not in the record"


def error_of(cell: Cell, arm: str = "") -> str:
    """The first error of a cell, or of one arm: a line says `arm NAME` where it happened. Empty without one."""
    errors = (line for _, line in cell.of("error") if not arm or arm in str(line["where"]).split())
    return next((f"error: {line['message']}" for line in errors), "")


def _by_round(times: dict[str, dict[int, float]]) -> Rounds:
    rounds = sorted({number for own in times.values() for number in own})
    return {arm: np.array([own.get(number, math.nan) for number in rounds]) for arm, own in times.items()}


def _time(cell: Cell, arm: str) -> Measurement:
    """The median over processes of a process's median."""
    medians = [np.median(ms[arm][~np.isnan(ms[arm])]) for ms in cell.rounds.values() if arm in ms]
    if not medians:
        return cell.value(arm, "ms_per_token", None, why_no_time(cell, arm))
    return replace(cell.value(arm, "ms_per_token", float(np.median(medians))), n=len(medians))


def _ratios(cell: Cell, arm: str, noise: Interval | None) -> list[Measurement]:
    """To the backbone in the same runtime, to the one through our own product, and to other arms."""
    base = cell.plain.get((cell.arms[arm].runtime, "base"), "")
    to_base = ratio(cell, arm, base)
    found = [cell.value(arm, "resolved", bool(to_base and is_resolved(to_base, noise)))]
    if to_base and arm != base:
        found.append(cell.interval(arm, "ratio", to_base))
    elif arm != base:
        timed = any(arm in times for times in cell.rounds.values())
        absent = base if timed else arm
        found.append(cell.value(arm, "ratio", None, f"no time of {absent} ({why_no_time(cell, absent)})"))
    known = {quantity: ratio(cell, arm, other) for quantity, other in _others(cell, arm).items()}
    return found + [cell.interval(arm, quantity, one) for quantity, one in known.items() if one]


def _others(cell: Cell, arm: str) -> dict[str, str]:
    """What else an arm is held against, by quantity: the backbone through our own product, its twin with one gate,
    later arms that differ in one thing alone, and the paper's own, AdaFuse's switch.
    """
    own, names = cell.arms[arm], list(cell.arms)
    found = {}
    if own.strategy == "fused" and cell.plain.get((own.runtime, "gemv")):
        found["gemv_ratio"] = cell.plain[own.runtime, "gemv"]
    for other, two in cell.arms.items():
        if other == arm or own.runtime != two.runtime or BASE in (own.method, two.method):
            continue
        same_method, same_strategy = own.method == two.method, own.strategy == two.strategy
        is_later = names.index(other) > names.index(arm)
        if (own.method, two.method) == (TWIN, ADAFUSE) and same_strategy:
            found["gate_ratio"] = other
        elif (two.method, two.strategy) == (ADAFUSE, "switch") or (is_later and same_method != same_strategy):
            found[f"over.{other}"] = other
    return found


def _cost(cell: Cell, arm: str, ms_per_token: float) -> list[Measurement]:
    """Counts are alike in all processes; the floor follows each one's own bandwidth, so its median is taken."""
    lines = cell.of("cost", arm)
    if not lines:
        return []
    first = lines[0][1]
    found = {name: first[name] for name in COUNTS if first.get(name) is not None}
    found["floor_ms"] = median(line["floor_ms"] for _, line in lines)
    read_gbps = [line["read_gbps"] for _, line in cell.of("calibration") if line["read_gbps"]]
    if not math.isnan(ms_per_token):
        found["over_floor"] = ms_per_token / found["floor_ms"]
        # bytes that a token needs, over its time, over the measured read bandwidth
        gbps = first["bytes_per_token"] / (ms_per_token * 1e6)
        found |= {"bandwidth_share": gbps / median(read_gbps)} if read_gbps else {}
    return cell.values(arm, found, [record for record, _ in lines])


def _checks(cell: Cell, arm: str) -> list[Measurement]:
    """The worst value of each check over the processes, its bound, whether all passed; and the one that decides."""
    by_name: dict[str, Lines] = {}
    for record, line in cell.of("check", arm):
        by_name.setdefault(line["check"], []).append((record, line))
    found: list[Measurement] = []
    for name, lines in by_name.items():
        records = [record for record, _ in lines]
        failed = [line for _, line in lines if not line["passed"]]
        worst = max(failed or [line for _, line in lines], key=_size)
        found.append(cell.value(arm, f"check.{name}", worst["value"], worst["detail"], records))
        found += cell.values(arm, {f"bound.{name}": worst["bound"], f"passed.{name}": not failed}, records)
    decisive = _decisive(cell, arm)
    if decisive:
        found.append(cell.value(arm, "check", decisive["value"], decisive["check"]))
        found.append(cell.value(arm, "check_bound", decisive["bound"]))
    return found


def _decisive(cell: Cell, arm: str) -> Json | None:
    """Of all processes: the first check that failed, else the one that came nearest to its bound."""
    lines = [line for _, line in cell.of("check", arm)]
    failed = next((line for line in lines if not line["passed"]), None)
    return failed or max(lines, key=_nearness, default=None)


def _size(check: Json) -> float:
    """A value that was not finite is the worst."""
    return math.inf if check["value"] is None else float(check["value"])


def _nearness(check: Json) -> float:
    """Where nothing at all may differ the bound is 0, and a check that passed came no nearer than any other."""
    return _size(check) / check["bound"] if check["bound"] else 0.0


def _peak(cell: Cell, arm: str) -> list[Measurement]:
    """The peak memory of an arm, if it was measured."""
    sizes = memory_values(cell, arm, memory_records(cell, arm))
    return [size for size in sizes if size.quantity == "peak_gib" and not math.isnan(size.value)]


def memory_values(cell: Cell, arm: str, records: list[str]) -> list[Measurement]:
    """Of several processes the one with the largest peak; without any, what the latency record counts, and why."""
    finished = [record for record in records if cell.frames.runs.at[record, "status"] != "unfinished"]
    lines = [line for record in finished for line in cell.frames.of("memory", record)]
    if lines:
        largest = max(lines, key=lambda line: line.get("peak_gib") or line.get("process_gib") or 0.0)
        found = cell.values(arm, {name: largest[name] for name in SIZES if largest.get(name)}, finished)
        reason = "a peak needs a GPU"
    else:
        found = [
            cell.value(arm, "weights_gib", line["weights_gib"]) for _, line in cell.of("memory", arm)[:1]
        ]
        failed = [line["message"] for record in finished for line in cell.frames.of("error", record)]
        reason = f"error: {failed[0]}" if failed else f"not measured: task=memory arms.run=[{arm}]"
        reason = UNFINISHED if records and not finished else reason
    known = any(value.quantity == "peak_gib" for value in found)
    return found if known else [*found, cell.value(arm, "peak_gib", None, reason)]


def memory_records(cell: Cell, arm: str) -> list[str]:
    """The memory records of this workload and just this arm; of two lengths of a decode, the one that the cell times
    if it was measured: the cache is part of the peak.
    """
    first = cell.runs.iloc[0]
    runs = [run for run in cell.memory if memory_arm(run) == arm]
    own = [run for run in runs if _arm_settings(run, arm) == _arm_settings(first, arm)]
    same = [run for run in own if run["block_tokens"] == first["block_tokens"]]
    return [str(run.name) for run in same or own]


def memory_arm(run: pd.Series) -> str:
    """The one arm of a memory record."""
    return str(run["config"]["arms"]["run"][0])


def _arm_settings(run: pd.Series, arm: str) -> str:
    """What an arm is, whatever it is called: strategy, runtime, and its method's own settings, as text."""
    own = run["config"]["arms"].get("table", {}).get(arm, {})
    method = method_settings(run["config"].get("methods", {}).get(own.get("method"), {}))
    # how fast a method learns has no part in what it holds
    method.pop("learning_rate_factor", None)
    return json.dumps([own.get("strategy"), own.get("runtime", EAGER), method], sort_keys=True)


def _timing(cell: Cell, runtime: str, again: Interval | None) -> list[Measurement]:
    """How finely two arms of a runtime can be told apart, what was left out, and the state of the device."""
    arms = [arm for arm, own in cell.arms.items() if own.runtime == runtime]
    blocks = [line for _, line in cell.of("block") if line["arm"] in arms]
    flags = [line["reason"] for _, line in cell.of("flag") if line["arm"] in arms]
    excluded = [line["excluded"] for line in blocks if line["excluded"] is not None]
    rounds = [_round_count(times, arms) for times in cell.rounds.values()]
    found: dict[str, float] = {"processes": sum(count > 0 for count in rounds), "rounds": sum(rounds)}
    found |= {"blocks": len(blocks), "excluded": len(excluded), "flagged": len(flags), **_device(blocks)}
    values = cell.values(runtime, found)
    if again:
        values.append(cell.value(runtime, "resolution", math.expm1(resolution(again))))
        values.append(cell.interval(runtime, "again_ratio", again))
    # details come after a colon and stay in the record
    causes = Counter(str(why).partition(":")[0] for why in [*excluded, *flags])
    said = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    return [*values, cell.value(runtime, "left_out", sum(causes.values()), said)] if causes else values


def _round_count(times: Rounds, arms: Iterable[str]) -> int:
    """Rounds of a process in which any of the arms has a block that counts."""
    own = [~np.isnan(times[arm]) for arm in arms if arm in times]
    return int(np.any(own, axis=0).sum()) if own else 0


def _device(blocks: list[Json]) -> dict[str, float]:
    """Clocks, power and neighbours during the blocks; nothing of what a CPU or an older record does not tell."""
    state = pd.DataFrame([line["state"] | {"arm": line["arm"]} for line in blocks]).dropna(
        axis="columns", how="all"
    )
    found = {name: float(state[name].median()) for name in ("sm_mhz", "power_w") if name in state}
    if "sm_mhz" in state:
        found["sm_mhz_lowest_arm"] = float(state.groupby("arm")["sm_mhz"].median().min())
    if "foreign_processes" in state:
        found["foreign_processes"] = float(state["foreign_processes"].max())
    return found
