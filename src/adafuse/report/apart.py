"""What is timed or counted: all cells of each experiment, and what is measured apart from arms in competition: single
layers, kernels, drift, traces, memory alone, calibration, backbones, and each record's own time and memory.

In: `Frames`. Out: `Measured`. Next: accuracy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from adafuse.report import latency
from adafuse.report.frames import Frames, Json
from adafuse.report.latency import Cell, Lines
from adafuse.report.measurements import CellName, Measured, Measurement, RowName
from adafuse.report.membership import coordinates
from adafuse.report.naming import KEYS, caption, cell_key, title
from adafuse.stats import paired_ratio

CALIBRATED = ["read_gbps", "copy_gbps", "rmw_gbps", "launch_us"]
CALIBRATED += ["empty_node_us", "tiny_node_us", "graph_launch_us"]
TRACED = ("untraced_ms", "launches", "host_launches", "graph_nodes", "gap_ms", "unlinked")
OF_KERNEL = ("ms", "naive_ms", "bytes", "floor_ms", "gbps", "share", "bound")
DRIFTED = ("weight_error", "delta_error", "logit_error", "agreement", "delta_share")
# the axes of scans that no override is called by, and the order of tables of gates
AXES = {"latency.gates": "gates", "latency.bypass_share": "bypass_share"}
GATES = ("router", "uniform", "zipf", "same", "distinct")
# by the last part of its name, an override that a cell's key tells already, or that only repeats a job
TOLD = {
    "model",
    "experts",
    "run",
    "task",
    "method",
    "name",
    *(name for names in KEYS.values() for name in names),
}
TOLD |= {"rounds", "settle_tokens", "check_tokens", "warmup", "runs", "replays", "save_every_steps"}


def measure(frames: Frames) -> Measured:
    """All that was timed or counted, under each experiment that it serves; backbones and records under none."""
    found = Measured()
    axes = _axes(frames)
    for cell in cells(frames):
        found.cells.append(_name(cell))
        found += PARTS[cell.task](cell)
        found.values += _calibration(cell)
        if cell.task == "latency" and cell.experiment in axes:
            axis = axes[cell.experiment]
            found.values.append(cell.value("", f"axis.{axis}", *_place(axis, cell.runs.iloc[0])))
    found += _backbones(frames)
    found.values += _records(frames)
    return found


def cells(frames: Frames) -> list[Cell]:
    """Every experiment's cells of what is timed: those of a GPU first, then by title."""
    runs = frames.runs[frames.runs["task"].isin(PARTS)].sort_values("name")
    members = frames.members[frames.members["record"].isin(runs.index)]
    keys = {record: cell_key(run) for record, run in runs.iterrows()}
    titles = {record: (run["machine"] == "CPU", title(run)) for record, run in runs.iterrows()}
    key = members["record"].map(keys) + members["overrides"].map(_further)
    found = [
        Cell(str(experiment), str(cell), str(task), runs[runs.index.isin(own["record"])], frames)
        for (experiment, cell, task), own in members.groupby([members["experiment"], key, members["task"]])
    ]
    return sorted(found, key=lambda cell: (titles[cell.runs.index[0]], cell.experiment, cell.key))


def _further(overrides: str) -> str:
    """Overrides by which two jobs of an experiment differ and which the key does not tell."""
    own = coordinates(overrides).items()
    return "".join(f" {name}={value}" for name, value in own if name.rpartition(".")[2] not in TOLD)


def _name(cell: Cell) -> CellName:
    run = cell.runs.iloc[0]
    machine = (run["machine"], run["machine"] == "CPU")
    return CellName(cell.experiment, cell.key, title(run), caption(cell.runs), *machine)


def _calibration(cell: Cell) -> list[Measurement]:
    """What the machine was measured to be able to do in the same processes; medians over them."""
    lines = cell.of("calibration")
    known = {name: value for name in CALIBRATED if (value := _median(lines, name)) is not None}
    return [replace(value, n=len(lines)) for value in cell.values("machine", known, _of(lines))]


def _layer(cell: Cell) -> Measured:
    """One adapted linear, each phase, length and rank: median ms of both parts, and adapters over backbone."""
    found = Measured()
    points = _grouped(cell, "layer", ("phase", "sequence_length", "rank"))
    for (phase, tokens, rank), lines in points.items():
        row = f"{phase} {tokens} rank{rank}"
        pairs = {record: _both_parts(lines, record) for record in _of(lines)}
        pairs = {record: pair for record, pair in pairs.items() if len(pair[0])}
        if not pairs:
            continue
        label = f"{phase}, {tokens} token{'s' * (tokens != 1)}, rank {rank}"
        found.rows.append(RowName(cell.experiment, cell.key, row, label))
        for i, name in enumerate(("adapters_ms", "backbone_ms")):
            middle = float(np.median([np.median(pair[i]) for pair in pairs.values()]))
            found.values.append(cell.value(row, name, middle, records=pairs))
        found.values.append(cell.interval(row, "ratio", paired_ratio(list(pairs.values())), pairs))
    return found


def _both_parts(lines: Lines, record: str) -> tuple[list[float], list[float]]:
    """Adapters and backbone of one process, as many of each."""
    own = [line for name, line in lines if name == record]
    parts = ("adapters", "backbone")
    adapters, backbone = ([line["ms"] for line in own if line["part"] == part] for part in parts)
    length = min(len(adapters), len(backbone))
    return adapters[:length], backbone[:length]


def _kernel(cell: Cell) -> Measured:
    """Every kernel at every size, in the order in which they were timed; medians over processes, the worst error."""
    found = Measured()
    cases = _grouped(cell, "kernel", ("kernel", "targets", "rank", "tokens"))
    for (kernel, targets, *sizes), lines in cases.items():
        known = zip(("rank", "tokens"), sizes, strict=True)
        row = " ".join([kernel, targets, *(f"{name}{size}" for name, size in known if size is not None)])
        numbers = {name: _median(lines, name) for name in OF_KERNEL}
        ms, naive_ms = numbers["ms"], numbers["naive_ms"]
        numbers["naive_ratio"] = naive_ms / ms if ms and naive_ms else None
        numbers["error"] = max(math.inf if line["error"] is None else line["error"] for _, line in lines)
        numbers["passed"] = all(line.get("passed", line["ms"] is not None) for _, line in lines)
        found.rows.append(RowName(cell.experiment, cell.key, row, kernel))
        found.values += cell.values(row, {n: v for n, v in numbers.items() if v is not None}, _of(lines))
        found.values += [] if ms else [cell.value(row, "ms", None, "check failed", _of(lines))]
    # a size of which nothing could be measured at all
    found.values += [
        cell.value(str(line["where"]), "ms", None, f"error: {line['message']}", [record])
        for record, line in cell.of("error")
    ]
    return found


def _drift(cell: Cell) -> Measured:
    """Errors after so many switches: medians over processes, none where one was not finite."""
    found = Measured()
    points = _grouped(cell, "drift", ("dtype", "strategy", "switches"))
    for (dtype, strategy, switches), lines in points.items():
        row = f"{strategy} {dtype} {switches}"
        found.rows.append(RowName(cell.experiment, cell.key, row, f"{strategy}, {dtype}", strategy=strategy))
        for name in DRIFTED:
            finite = all(line.get(name) is not None for _, line in lines)
            value = _median(lines, name) if finite else None
            found.values.append(cell.value(row, name, value, "" if finite else "not finite", _of(lines)))
        identical = all(line.get("identical") for _, line in lines)
        found.values.append(cell.value(row, "identical", identical, records=_of(lines)))
    return found


def _trace(cell: Cell) -> Measured:
    """Where one token's time goes; of several processes the token of median length."""
    found = Measured(rows=latency.row_names(cell))
    drawn = {(record, line["arm"]) for record, line in cell.of("spans")}
    for arm in cell.arms:
        lines = [(record, line) for record, line in cell.of("trace", arm) if (record, arm) in drawn]
        own = sorted(((_token_ms(line), record, line) for record, line in lines), key=lambda one: one[0])
        if not own:
            found.values.append(cell.value(arm, "token_ms", None, latency.why_no_time(cell, arm)))
            continue
        token_ms, record, line = own[(len(own) - 1) // 2]
        known = {"token_ms": token_ms, "gap_share": line["gap_ms"] / token_ms}
        known |= {name: line[name] for name in TRACED if line.get(name) is not None}
        known |= {f"{part}_ms": value for part, value in line["parts_ms"].items()}
        found.values += cell.values(arm, known, [record])
        words = {name: line[name] for name in ("attributed_by", "disagreement") if line.get(name)}
        found.values += [cell.value(arm, name, None, str(word), [record]) for name, word in words.items()]
    return found


def _memory(cell: Cell) -> Measured:
    """Memory by itself, for a workload that may not have been timed."""
    found = Measured(rows=latency.row_names(cell))
    for arm in cell.arms:
        own = [str(record) for record, run in cell.runs.iterrows() if latency.memory_arm(run) == arm]
        found.values += latency.memory_values(cell, arm, own)
    return found


PARTS: dict[str, Callable[[Cell], Measured]] = {
    "latency": latency.measure,
    "memory": _memory,
    "layer": _layer,
    "kernel": _kernel,
    "drift": _drift,
    "trace": _trace,
}


def _grouped(cell: Cell, kind: str, names: tuple[str, ...]) -> dict[tuple[Any, ...], Lines]:
    """The lines of a kind, each with its record, by the values of some fields, in their order in the records."""
    found: dict[tuple[Any, ...], Lines] = {}
    for record, line in cell.of(kind):
        found.setdefault(tuple(line.get(name) for name in names), []).append((record, line))
    return found


def _median(lines: Lines, name: str) -> float | None:
    known = [line[name] for _, line in lines if line.get(name) is not None]
    return median(known) if known else None


def _of(lines: Lines) -> list[str]:
    """The records of some lines."""
    return list(dict.fromkeys(record for record, _ in lines))


def _token_ms(line: Json) -> float:
    """What the launches of a traced token fill, and the gaps between them."""
    return float(sum(line["parts_ms"].values()) + line["gap_ms"])


def _axes(frames: Frames) -> dict[str, str]:
    """What each scan goes over: an experiment whose timed jobs differ in one thing alone."""
    found: dict[str, str] = {}
    timed = frames.members[frames.members["task"] == "latency"]
    for experiment, overrides in timed.groupby("experiment")["overrides"]:
        jobs = pd.DataFrame([coordinates(words) for words in overrides.unique()])
        moved = [name for name in jobs if jobs[name].nunique(dropna=False) > 1]
        if len(moved) == 1:
            found[str(experiment)] = AXES.get(str(moved[0]), str(moved[0]))
    return found


def _place(axis: str, run: pd.Series) -> tuple[float | None, str]:
    """Where a cell stands in a scan: a number or a rank, and what it is called there."""
    if axis == "experts":
        linears = run["targets"].count(",") + 1
        targets = "all" if linears == 7 else run["targets"].replace(" ", "")
        # by linears, then rank, then experts
        place = linears * 1e6 + run["rank"] * 1e3 + run["count"]
        return place, f"{targets} r={run['rank']} {run['count']} experts"
    value = run.get(axis)
    if axis == "gates":
        return GATES.index(value) if value in GATES else None, str(value)
    return value if isinstance(value, (int, float)) else None, str(value)


def _backbones(frames: Frames) -> Measured:
    """The backbones that were pre-trained here, a row a record; the checksum stands as the reason of `sha256`."""
    found = Measured()
    runs = frames.runs[frames.runs["task"] == "pretrain"]
    for record, run in runs.sort_values("name").iterrows():
        row, cell = str(record), Cell("", cell_key(run), "pretrain", runs.loc[[record]], frames)
        found.cells.append(_name(cell))
        found.rows.append(RowName("", cell.key, row, run["model"]))
        found.values += cell.values(row, _of_backbone(cell))
        found.values += [cell.value(row, "sha256", None, line["sha256"]) for _, line in cell.of("artifact")]
        failure = latency.error_of(cell) or ("" if cell.finished else latency.UNFINISHED)
        found.values += [cell.value(row, "failed", None, failure, [row])] if failure else []
    return found


def _of_backbone(cell: Cell) -> dict[str, float]:
    """Steps and tokens that it learnt from, held-out losses, size, and seconds of the process that ended it."""
    knobs = cell.runs.iloc[0]["config"].get("pretrain") or {}
    known: dict[str, float] = {"steps": knobs["steps"]} if "steps" in knobs else {}
    names = ("steps", "batch", "accumulation", "max_length")
    known |= {"tokens": math.prod(knobs[name] for name in names)} if set(names) <= knobs.keys() else {}
    losses = [line for _, line in cell.of("metric") if line["metric"] == "loss"]
    known |= {f"loss.{line['suite_task']}": line["value"] for line in losses}
    ends = {"parameters": "trainable", "end": "seconds", "artifact": "resumed_from_step"}
    for kind, name in ends.items():
        known.update((name, line[name]) for _, line in cell.of(kind) if line.get(name) is not None)
    return known


def _records(frames: Frames) -> Iterator[Measurement]:
    """Every record's own seconds and memory, and how many errors it holds."""
    for record in frames.records:
        for line in frames.of("end", record):
            for name in ("seconds", "peak_rss_gib"):
                yield Measurement("", "", record, name, line[name], records=(record,))
        errors = [line["message"] for line in frames.of("error", record)]
        if errors:
            yield Measurement("", "", record, "errors", len(errors), reason=errors[0], records=(record,))
