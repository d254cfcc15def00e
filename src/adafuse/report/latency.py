"""What is timed or counted: decoded tokens arm by arm, and apart from them single layers, kernels, drift, traces,
memory, calibration, backbones, and each record's own time.

In: `Frames`. Out: `Measured`, by experiment and cell (backbones and records under none). An arm is compared with the
plain backbone in its own runtime, so that no adapter gets the credit for a CUDA graph; ratios are paired by round
within a process, and hosts are the units of an interval, of one host its processes. Next: accuracy.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from adafuse.report.frames import Frames, method_settings, setting
from adafuse.report.measurements import OF_HOSTS, ROWS, CellName, Measured, RowName, told
from adafuse.report.membership import coordinates
from adafuse.report.naming import (
    ADAFUSE,
    BASE,
    GEOMETRY,
    KEYS,
    PEFT,
    TWIN,
    Arm,
    arms_of,
    caption,
    cell_key,
    outdated,
    title,
)
from adafuse.stats import Interval, paired_ratio, resolution

PLACE = ["experiment", "cell", "task"]
ARM = [*PLACE, "row"]
# as in Interval; a line that says nothing of hosts ends before them
NUMBER = [*ARM, "quantity", "value", "low", "high", "n", "rounds", "reason", "hosts", *OF_HOSTS]
OF_ARMS = ["latency", "memory", "trace"]
CALIBRATED = ["read_gbps", "copy_gbps", "rmw_gbps", "launch_us", "empty_node_us", "tiny_node_us"]
CALIBRATED += ["graph_launch_us"]
COUNTS = ["params", "macs", "adapter_params", "bytes_per_token", "floor_ms"]
SIZES = ["weights_gib", "peak_gib", "peak_load_gib", "process_gib", "reserved_gib"]
TRACED = ["untraced_ms", "launches", "host_launches", "graph_nodes", "gap_ms", "unlinked"]
OF_FIT = ["parameters", "tokens_per_s", "flops_per_token", "matrix_share", "peak_gib"]
OF_KERNEL = ["ms", "naive_ms", "bytes", "floor_ms", "gbps", "share", "bound"]
DRIFTED = ["weight_error", "delta_error", "logit_error", "agreement", "delta_share"]
# what two workloads must agree in for memory that was measured of one to be the other's
WORKLOAD = ["folder", "model", "path", "shape", "dtype", *GEOMETRY, "batch", "context"]
# by the last part of its name, an override that a cell's key tells already, or that only repeats a job
TOLD = {"model", "experts", "run", "task", "method", "name"}.union(*KEYS.values())
TOLD |= {"rounds", "settle_tokens", "check_tokens", "warmup", "runs", "replays", "save_every_steps"}
UNFINISHED = "unfinished record: run the same command again"


@dataclass(frozen=True)
class Cells:
    """`records`: a line for each record in a cell, with its settings; cells in the order of tables (those of a GPU
    first, then by title), records by name. `arms`: a line for each arm that a cell was to run, with what it is.
    `outdated`: (*place, record, arm) of what is left out, because the cell has a newer version of the arm.
    """

    frames: Frames
    records: pd.DataFrame
    arms: pd.DataFrame
    outdated: set[tuple[Any, ...]]

    def lines(self, kind: str) -> pd.DataFrame:
        """The lines of a kind in the finished records of each cell, in their order; an arm is a row."""
        return self.placed(self.frames.lines(kind))

    def placed(self, lines: pd.DataFrame) -> pd.DataFrame:
        """Such lines, once for each cell that holds their record."""
        own = lines.rename(columns={"arm": "row"})
        return self.current(self.records[[*PLACE, "record"]].merge(own, on="record"))

    def current(self, lines: pd.DataFrame) -> pd.DataFrame:
        """Placed lines without those of older code."""
        if not self.outdated or "row" not in lines:
            return lines
        return lines[~pd.MultiIndex.from_frame(lines[[*PLACE, "record", "row"]]).isin(self.outdated)]


def measure(frames: Frames) -> Measured:
    """All that was timed or counted, under each experiment that it serves; backbones and records under none."""
    cells = _cells(frames)
    times = pd.DataFrame([dict(zip(NUMBER, one, strict=False)) for one in _times(cells)], columns=NUMBER)
    parts = [part(cells) for part in (_checks, _timing, _memory, _kernel, _trace, _backbones, _of_records)]
    of_lines = {"calibration": _calibration, "layer": _layer, "drift": _drift, "fit_speed": _fit_speed}
    parts += [part(cells) for kind, part in of_lines.items() if len(cells.lines(kind))]
    found = pd.concat([cells.arms, times, _costs(cells, times), *parts], ignore_index=True)
    finished = cells.records[cells.records["status"] != "unfinished"]
    mended = pd.DataFrame([(*place, row) for *place, _, row in cells.outdated], columns=ARM)
    own = behind(cells.current(finished.merge(mended.drop_duplicates(), on=PLACE)), ARM)
    found["records"] = found["records"].fillna(found[ARM].join(own, on=ARM)["records"])
    rows, each = found.dropna(subset="label").drop_duplicates(ARM), cells.records.groupby(PLACE, sort=False)
    return measured(found.dropna(subset="quantity"), behind(finished, PLACE), rows, each)


def measured(values: pd.DataFrame, records: pd.Series, rows: pd.DataFrame, cells: Any) -> Measured:
    """Numbers, those without a record on `records` of their cell or row; and names, of `cells` from grouped runs."""
    keys, names = [str(key) for key in records.index.names], []
    values = values.assign(records=values["records"].fillna(values[keys].join(records, on=keys)["records"]))
    for (experiment, cell, *_), runs in cells:
        run = runs.iloc[0]
        machine = run["machine"], run["machine"] == "CPU"
        names.append(CellName(experiment, cell, title(run), caption(runs), *machine))
    words = rows.reindex(columns=ROWS).fillna("").itertuples(index=False, name=None)
    return Measured(told(values), names, [RowName(*row) for row in words])


def behind(lines: pd.DataFrame, by: list[str]) -> pd.Series:
    """The records of lines, each once."""
    each = lines[[*by, "record"]].drop_duplicates().groupby(by, sort=False)
    return each["record"].agg(tuple).rename("records")


def _cells(frames: Frames) -> Cells:
    runs = frames.runs[~frames.runs["task"].isin(["train", "evaluate"])]
    words = [(cell_key(run), title(run), run["machine"] == "CPU") for _, run in runs.iterrows()]
    # a backbone serves all experiments, and is told once
    pretrained = runs[runs["task"] == "pretrain"].reset_index().assign(experiment="", overrides="")
    own = pd.concat([frames.members[frames.members["task"] != "pretrain"], pretrained])
    own = own.join(pd.DataFrame(words, runs.index, ["key", "title", "is_cpu"]), on="record", how="inner")
    jobs = [coordinates(overrides).items() for overrides in own["overrides"]]
    # overrides by which two jobs of an experiment differ and which the key does not tell
    further = [[f" {name}={value}" for name, value in job if name.split(".")[-1] not in TOLD] for job in jobs]
    own = own.assign(cell=own["key"] + list(map("".join, further)))
    own = own.sort_values(["is_cpu", "title", *PLACE, "name"]).drop_duplicates([*PLACE, "record"])
    lines, versioned = [], own[own["task"].isin([*OF_ARMS, "fit_speed"])].groupby(PLACE, sort=False)
    older = {(*place, *which) for place, cell in versioned for which in outdated(cell)}
    for place, cell in own[own["task"].isin(OF_ARMS)].groupby(PLACE, sort=False):
        first, arms = cell.iloc[0], dict[str, Arm]()
        for _, run in cell.iterrows():
            for name, arm in arms_of(run).items():
                if name not in arms or (*place, run["record"], name) not in older:
                    arms[name] = arm
        tokens = first["block_tokens"]
        lines += [[*place, name, *arm, _held(first, name, arm.version), tokens] for name, arm in arms.items()]
    return Cells(frames, own, pd.DataFrame(lines, columns=[*ARM, *Arm._fields, "held", "tokens"]), older)


def _held(run: pd.Series, arm: str, version: int) -> str:
    """All that the memory of an arm hangs on but for the tokens that are decoded, as text: the workload, strategy,
    runtime, version, and the method's own settings, of which how fast it learns has no part in what it holds.
    """
    own = setting(run["config"], f"arms.table.{arm}") or {}
    method = method_settings(setting(run["config"], f"methods.{own.get('method')}"))
    what = [arm, own.get("strategy"), own.get("runtime"), version, method | {"learning_rate_factor": None}]
    return json.dumps([*(run[name] for name in WORKLOAD), *what], sort_keys=True)


def _long(wide: pd.DataFrame) -> pd.DataFrame:
    """A line for each number of a frame with a column a quantity; none for what is not known."""
    long = wide.reset_index().melt(wide.index.names, var_name="quantity", ignore_index=False)
    return long.sort_index(kind="stable").dropna(subset="value")


def _grouped(lines: pd.DataFrame, by: list[str], names: list[str]) -> Any:
    """Numbers of lines, nan where one has none, by what lines share, in their order."""
    return lines.reindex(columns=names).astype(float).groupby([lines[name] for name in by], sort=False)


def counted(frames: Frames) -> pd.DataFrame:
    """The blocks that count, neither excluded at once nor flagged at the end, with their `ms` a token."""
    each, blocks = ["record", "arm", "round"], frames.lines("block")
    flags = pd.MultiIndex.from_frame(frames.lines("flag")[each])
    own = blocks[blocks["excluded"].isna() & ~pd.MultiIndex.from_frame(blocks[each]).isin(flags)]
    own = own.drop_duplicates(each, keep="last")
    return own.assign(ms=(own["block_ms"] / own["tokens"]).astype(float))


def _times(cells: Cells) -> Iterator[tuple[Any, ...]]:
    """Of each arm the median over processes of a process's median, and how much longer it takes than others, or why
    there is none; of a runtime how far the backbone is from itself (A/A).
    """
    times = dict[str, dict[str, Any]]()
    ms = counted(cells.frames).set_index(["record", "round", "arm"])["ms"].unstack("arm")
    for record, places in ms.groupby(level="record").indices.items():
        timed = zip(ms.columns, ms.to_numpy()[places].T, strict=True)
        times[str(record)] = {arm: rounds for arm, rounds in timed if np.isfinite(rounds).any()}
    records: Any = behind(cells.records, PLACE)
    for place, own in cells.arms[cells.arms["task"] == "latency"].groupby(PLACE, sort=False):
        known = [record for record in records[place] if record in times]
        hosts = list(cells.frames.runs["host_id"].loc[known])
        processes = [
            {arm: ms for arm, ms in times[record].items() if (*place, record, arm) not in cells.outdated}
            for record in known
        ]
        arms: dict[str, Any] = {arm.row: arm for arm in list[Any](own.itertuples(index=False))}
        none = [math.nan, math.nan, math.nan, None, 0]
        for name, arm in arms.items():
            medians = [np.nanmedian(times[name]) for times in processes if name in times]
            why = "" if medians else _why(cells, place, name)
            numbers = [np.median(medians), math.nan, math.nan, len(medians), 0] if medians else none
            yield *place, name, "ms_per_token", *numbers, why
            for quantity, other in _others(arm, list(arms.values())).items():
                found = _paired(processes, hosts, name, other)
                row, quantity = (arm.runtime, quantity) if quantity == "again_ratio" else (name, quantity)
                if found:
                    yield *place, row, quantity, *vars(found).values()
                elif quantity == "ratio":
                    absent = f"{other} ({_why(cells, place, other)})" if medians else f"{name} ({why})"
                    both = medians and any(other in times for times in processes)
                    said = "no round in which both count" if both else f"no time of {absent}"
                    yield *place, name, quantity, *none, said
                if found and quantity == "again_ratio":
                    yield *place, row, "resolution", math.expm1(resolution(found)), *none[1:], ""


def _others(arm: Any, arms: list[Any]) -> dict[str, str]:
    """What an arm is held against in its runtime, by quantity: the plain backbone, and that through the product of our
    own that strategy fused is built on; its twin with one gate, later arms that differ in one thing alone, and the
    paper's own, AdaFuse's switch.
    """
    arms = [other for other in arms if other.runtime == arm.runtime]
    plain = [other.row for other in arms if (other.method, other.strategy) == (BASE, "dense")]
    gemv = [other.row for other in arms if (other.method, other.strategy) == (BASE, "fused")]
    found = {"ratio": plain[0]} if plain and arm.row != plain[0] else {}
    found |= {"again_ratio": plain[0]} if arm.row in plain[1:2] else {}
    found |= {"gemv_ratio": gemv[0]} if gemv and arm.strategy == "fused" else {}
    for other in arms if arm.method != BASE else []:
        if other is arm or other.method == BASE:
            continue
        same_method, same_strategy = arm.method == other.method, arm.strategy == other.strategy
        is_later = same_method != same_strategy and arms.index(other) > arms.index(arm)
        if (arm.method, other.method) == (TWIN, ADAFUSE) and same_strategy:
            found["gate_ratio"] = other.row
        elif is_later or (other.method, other.strategy) == (ADAFUSE, "switch"):
            found[f"over.{other.row}"] = other.row
    return found


def _paired(processes: list[dict[str, Any]], hosts: list[str], arm: str, other: str) -> Interval | None:
    """Time of `arm` over that of `other`, paired by round within each process; None if no round has both."""
    every = zip(processes, hosts, strict=True)
    own = [(times[arm], times[other], host) for times, host in every if {arm, other} <= times.keys()]
    both = [
        (one[known], two[known], host) for one, two, host in own if (known := np.isfinite(one / two)).any()
    ]
    return paired_ratio([pair[:2] for pair in both], [host for *_, host in both]) if both else None


def _over_hosts(cells: Cells, both: pd.DataFrame, one: str, two: str) -> list[Any]:
    """Column `one` over column `two`, of lines by record."""
    processes = [(own[one], own[two]) for _, own in both.groupby(level="record", sort=False)]
    hosts = [cells.frames.runs.at[record, "host_id"] for record in both.index.unique("record")]
    return [*vars(paired_ratio(processes, hosts)).values()]


def _why(cells: Cells, place: Any, arm: str) -> str:
    """Why an arm that was asked for has no time."""
    own = [cells.lines(kind) for kind in ("end", "check", "error", "block")]
    ends, checks, errors, blocks = (lines[(lines[PLACE] == place).all(axis=1)] for lines in own)
    failed = checks[(checks["row"] == arm) & ~checks["passed"].astype(bool)]
    # a line says `arm NAME` where it happened
    of_arm = [arm in str(where).split() for where in errors["where"]]
    reasons = [] if len(ends) else [UNFINISHED]
    for check, value, bound in zip(failed["check"], failed["value"], failed["bound"], strict=True):
        shown = "none" if pd.isna(value) else f"{value:.3g}"
        reasons.append(f"check failed: {check} {shown}, bound {bound:.3g}")
    reasons += [f"error: {message}" for message in errors.loc[of_arm, "message"]]
    excluded = blocks.loc[blocks["row"] == arm, "excluded"].dropna()
    reasons += [f"every block excluded: {why}" for why in excluded]
    reasons += [f"error: {message}" for message in errors["message"]]
    return [*reasons, "not in the record"][0]


def _costs(cells: Cells, times: pd.DataFrame) -> pd.DataFrame:
    """Counts are alike in all processes; the floor follows each one's own bandwidth, so its median is taken."""
    lines, ms = cells.lines("cost"), times[times["quantity"] == "ms_per_token"].set_index(ARM)["value"]
    own, read = (_grouped(lines, ARM, COUNTS), _grouped(cells.lines("calibration"), PLACE, ["read_gbps"]))
    wide = own.first().assign(floor_ms=own["floor_ms"].median())
    wide["over_floor"] = ms / wide["floor_ms"]
    # bytes that a token needs, over its time, over the measured read bandwidth
    wide["bandwidth_share"] = wide.pop("bytes_per_token") / (ms * 1e6) / wide.join(read.median())["read_gbps"]
    return _long(wide).join(behind(lines, ARM), on=ARM)


def _checks(cells: Cells) -> pd.DataFrame:
    """The worst value of each check over the processes, and its bound as `high`; and of all checks the one that
    decides: the first that failed, else the one that came nearest to its bound.
    """
    lines, each = cells.lines("check"), [*ARM, "check"]
    # a value that was not finite is the worst
    size, failed = lines["value"].astype(float).fillna(math.inf), ~lines["passed"].astype(bool)
    # where nothing at all may differ the bound is 0, and a check that passed came no nearer than any other
    near = (size / lines["bound"]).where(lines["bound"] != 0, 0.0).mask(failed, math.inf)
    lines = lines.assign(size=size, failed=failed, near=near, order=lines.groupby(each, sort=False).ngroup())
    worst = lines.sort_values(["failed", "size"], ascending=False).drop_duplicates("order")
    worst = worst.sort_values("order").drop(columns="record").join(behind(lines, each), on=each)
    nearest = lines.sort_values("near", ascending=False, kind="stable").drop_duplicates(ARM)
    names = worst["check"].map("check.{}".format)
    parts = [worst.assign(quantity=names, high=worst["bound"], reason=worst["detail"])]
    nearest = nearest.drop(columns="record").join(behind(lines, ARM), on=ARM)
    parts.append(nearest.assign(quantity="check", reason=nearest["check"]))
    return pd.concat([*parts, nearest.assign(quantity="check_bound", value=nearest["bound"])])


def _timing(cells: Cells) -> pd.DataFrame:
    """How much of a runtime was timed, what was left out, and the state of the device as far as it was told."""
    by, arms, lines = [*PLACE, "runtime"], cells.arms, [cells.lines("block"), cells.lines("flag")]
    lines.append(cells.placed(counted(cells.frames)))
    blocks, flags, timed = (own.merge(arms[[*ARM, "runtime"]], on=ARM) for own in lines)
    rounds = timed.drop_duplicates([*by, "record", "round"]).groupby(by)["record"]
    every, runtimes = blocks.groupby(by), arms.loc[arms["task"] == "latency", by].drop_duplicates()
    numbers = {"processes": rounds.nunique(), "rounds": rounds.size(), "blocks": every.size()}
    numbers |= {"excluded": every["excluded"].count(), "flagged": flags.groupby(by).size()}
    state = blocks[[*by, "row"]].join(pd.DataFrame(blocks["state"].tolist(), blocks.index))
    lowest = _grouped(state, [*by, "row"], ["sm_mhz"]).median().groupby(by).min()
    state = _grouped(state, by, ["sm_mhz", "power_w", "foreign_processes"])
    wide = pd.DataFrame(numbers, pd.MultiIndex.from_frame(runtimes)).fillna(0.0)
    wide = wide.join(state.median()).join(lowest.add_suffix("_lowest_arm"))
    wide["foreign_processes"] = state["foreign_processes"].max()
    causes = pd.concat([blocks.assign(reason=blocks["excluded"]).dropna(subset="reason"), flags])
    # details come after a colon and stay in the record
    causes["reason"] = causes["reason"].astype(str).str.split(":").str[0]
    # the most frequent first
    words = causes.groupby(by)["reason"].agg(
        lambda own: ", ".join(f"{n} {why}" for why, n in Counter(map(str, own)).most_common())
    )
    left_out = pd.DataFrame({"value": causes.groupby(by).size(), "reason": words})
    left_out = left_out.reset_index().assign(quantity="left_out")
    return pd.concat([_long(wide), left_out]).rename(columns={"runtime": "row"})


def _memory(cells: Cells) -> pd.DataFrame:
    """What arms hold, as records of memory alone of the same workload and just this arm say, of several that with the
    largest peak; without any, what the latency record counts, and why there is no peak. Beside it the backbone's peak.
    """
    arms, own = cells.arms[cells.arms["task"] != "trace"], _alone(cells)
    sizes = own.merge(cells.frames.lines("memory").drop(columns="arm"), on="record")
    sizes[SIZES] = sizes.reindex(columns=SIZES).astype(float).replace(0.0, math.nan)
    sizes["most"] = sizes["peak_gib"].fillna(sizes["process_gib"])
    sizes = sizes.sort_values("most", ascending=False, kind="stable").drop_duplicates(ARM).set_index(ARM)
    found = _long(sizes[SIZES]).join(behind(own, ARM), on=ARM)
    counted = cells.lines("memory").query("task == 'latency'").drop_duplicates(ARM).set_index(ARM)
    counted = _long(counted.loc[~counted.index.isin(sizes.index), ["weights_gib"]])
    errors = own.merge(cells.frames.lines("error"), on="record").drop_duplicates(ARM).set_index(ARM)
    peaks = found[found["quantity"] == "peak_gib"]
    lacking = arms[~pd.MultiIndex.from_frame(arms[ARM]).isin(pd.MultiIndex.from_frame(peaks[ARM]))]
    failed = errors["message"].map("error: {}".format)
    reasons = sizes.assign(reason="a peak needs a GPU")["reason"].combine_first(failed)
    lacking = lacking[ARM].join(reasons, on=ARM).assign(quantity="peak_gib")
    without = lacking["row"].map("not measured: task=memory arms.run=[{}]".format)
    lacking["reason"] = lacking["reason"].fillna(without)
    runtime = [*PLACE, "runtime"]
    plain = arms[(arms["method"] == BASE) & (arms["task"] == "latency")].drop_duplicates(runtime)
    plain = plain[[*ARM, "runtime"]].merge(peaks.assign(quantity="base_peak_gib"), on=ARM).drop(columns="row")
    beside = arms[[*ARM, "runtime"]].merge(plain, on=runtime).drop(columns="runtime")
    return pd.concat([found, counted, lacking, beside])


def _alone(cells: Cells) -> pd.DataFrame:
    """The finished records of memory alone behind each arm; a cell of memory alone holds its own."""
    runs = cells.frames.runs.query("task == 'memory' and status != 'unfinished'")
    lone = [(setting(run["config"], "arms.run")[0], run) for _, run in runs.iterrows()]
    held = [_held(run, arm, arms_of(run)[arm].version) for arm, run in lone]
    lines = [(run.name, arm, what, run["block_tokens"]) for (arm, run), what in zip(lone, held, strict=True)]
    every = pd.DataFrame(lines, columns=["record", "row", "held", "own_tokens"], dtype=object)
    timed = cells.arms[cells.arms["task"] == "latency"].merge(every, on=["row", "held"])
    # of two lengths of a decode, the one that the cell times if it was measured: the cache is part of the peak
    is_same = timed["tokens"] == timed["own_tokens"]
    timed = timed[is_same | ~is_same.groupby([timed[name] for name in ARM]).transform("any")]
    return pd.concat([timed, cells.placed(every)])[[*ARM, "record"]]


def _calibration(cells: Cells) -> pd.DataFrame:
    """What the machine was measured to be able to do in the same processes; medians over them."""
    lines = cells.lines("calibration").assign(row="machine")
    found = _long(_grouped(lines, ARM, CALIBRATED).median())
    return found.join(lines.groupby(ARM).size().rename("n"), on=ARM)


def _layer(cells: Cells) -> pd.DataFrame:
    """One adapted linear, by phase, length and rank: median ms of both parts, and adapters over backbone."""
    lines, each = cells.lines("layer"), [*ARM, "label", "record"]
    points = [*zip(lines["phase"], lines["sequence_length"], lines["rank"], strict=True)]
    lines["row"] = [f"{phase} {length} rank{rank}" for phase, length, rank in points]
    words = [f"{phase}, {length} token{'s' * (length != 1)}" for phase, length, _ in points]
    lines["label"] = [f"{word}, rank {rank}" for word, (*_, rank) in zip(words, points, strict=True)]
    # as many of each part as the one that has fewer
    lines["number"] = lines.groupby([*each, "part"]).cumcount()
    both = lines.set_index([*each, "number", "part"])["ms"].unstack(sort=False)
    both = both.reindex(columns=["adapters", "backbone"]).dropna().add_suffix("_ms")
    wide = both.groupby(each, sort=False).median().groupby(each[:-1], sort=False).median()
    ratios = []
    for point, own in both.groupby(ARM, sort=False):
        ratios.append((*point, "ratio", *_over_hosts(cells, own, "adapters_ms", "backbone_ms")))
    found = pd.concat([_long(wide), pd.DataFrame(ratios, columns=NUMBER)])
    return found.join(behind(both.reset_index(), ARM), on=ARM)


def _kernel(cells: Cells) -> pd.DataFrame:
    """Every kernel at every size, in the order in which they were timed; medians over processes, the worst error."""
    lines, forms = (
        cells.lines("kernel"),
        {"kernel": "{}", "targets": "{}", "rank": "rank{:g}", "tokens": "tokens{:g}"},
    )
    lines = lines.reindex(columns=list(dict.fromkeys([*lines, *OF_KERNEL, *forms, "passed"])))
    words = [lines[name].map(form.format, na_action="ignore").fillna("") for name, form in forms.items()]
    lines["row"] = [" ".join(filter(None, own)) for own in zip(*words, strict=True)]
    lines["label"] = lines["kernel"]
    lines["error"] = lines["error"].fillna(math.inf)
    own = _grouped(lines, [*ARM, "label"], [*OF_KERNEL, "error", "passed"])
    wide = own[OF_KERNEL].median().assign(error=own["error"].max(), passed=own["passed"].min())
    wide["naive_ratio"] = wide["naive_ms"] / wide["ms"]
    failed = wide.loc[wide["ms"].isna(), []].reset_index().assign(quantity="ms", reason="check failed")
    # a size of which nothing could be measured at all
    errors = cells.lines("error").query("task == 'kernel'")
    errors = errors.assign(
        row=errors["where"], quantity="ms", reason=errors["message"].map("error: {}".format)
    )
    found = pd.concat([_long(wide), failed, errors.drop(columns="record")])
    return found.join(behind(pd.concat([lines, errors]), ARM), on=ARM)


def _fit_speed(cells: Cells) -> pd.DataFrame:
    """Steps of training: medians over processes, and tokens/s over those of PEFT's LoRA, paired by round."""
    lines, ratios = cells.lines("fit_speed"), []
    blocks = cells.placed(counted(cells.frames)).query("task == 'fit_speed'")
    ms = blocks.pivot(index=[*PLACE, "record", "round"], columns="row", values="ms")
    for place, own in ms.groupby(level=PLACE, sort=False):
        for arm in own.columns.drop(PEFT, errors="ignore"):
            both = own.reindex(columns=[PEFT, arm]).dropna()
            if len(both):
                ratios.append((*place, arm, "ratio", *_over_hosts(cells, both, PEFT, arm)))
    found = pd.concat([_long(_grouped(lines, ARM, OF_FIT).median()), pd.DataFrame(ratios, columns=NUMBER)])
    return found.join(behind(lines, ARM), on=ARM)


def _drift(cells: Cells) -> pd.DataFrame:
    """Errors after so many switches: medians over processes, none where one was not finite."""
    lines = cells.lines("drift").join(drift_rows(cells.lines("drift")))
    own = _grouped(lines, [*ARM, "label", "strategy"], [*DRIFTED, "identical"])
    finite = own.count().eq(own.size(), axis=0)
    wide = own.median().where(finite, math.inf).assign(identical=own["identical"].min())
    found = _long(wide).join(behind(lines, ARM), on=ARM)
    gone = np.isinf(found["value"])
    return found.assign(value=found["value"].mask(gone), reason=np.where(gone, "not finite", ""))


def drift_rows(lines: pd.DataFrame) -> pd.DataFrame:
    """The row of each line, and its label, which all numbers of switches share."""
    words = lines[["strategy", "dtype", "switches"]].astype(str)
    label = words["strategy"] + ", " + words["dtype"]
    return pd.DataFrame({"row": words.agg(" ".join, axis=1), "label": label})


def _trace(cells: Cells) -> pd.DataFrame:
    """Where one token's time goes; of several processes the token of median length."""
    lines = cells.lines("trace").merge(cells.lines("spans")[[*ARM, "record"]].drop_duplicates())
    lines = median_tokens(lines, ARM)
    parts = pd.DataFrame(lines["parts_ms"].tolist(), lines.index).add_suffix("_ms")
    lines = lines.assign(gap_share=lines["gap_ms"] / lines["token_ms"], **parts)
    wide = lines.reindex(columns=["token_ms", "gap_share", *TRACED, *parts]).astype(float)
    words = _long(lines.reindex(columns=["attributed_by", "disagreement"]).replace("", None))
    found = pd.concat([_long(wide), words.rename(columns={"value": "reason"})])
    lacking = cells.arms[cells.arms["task"] == "trace"][ARM]
    lacking = lacking[~pd.MultiIndex.from_frame(lacking).isin(lines.index)]
    why = [_why(cells, arm[:3], arm[3]) for arm in lacking.itertuples(index=False, name=None)]
    found = found.join(behind(lines.reset_index(), ARM), on=ARM)
    return pd.concat([found, lacking.assign(quantity="token_ms", reason=why)])


def median_tokens(lines: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Of the traces that share `by`, which becomes the index, that of median length, in the order of `token_ms`."""
    token_ms = [sum(parts.values()) for parts in lines["parts_ms"]] + lines["gap_ms"]
    lines = lines.assign(token_ms=token_ms.astype(float)).sort_values("token_ms", kind="stable")
    same = lines.groupby(by)["record"]
    return lines[same.cumcount() == (same.transform("size") - 1) // 2].set_index(by)


def _backbones(cells: Cells) -> pd.DataFrame:
    """The backbones that were pre-trained here, a row a record: steps and tokens that it learnt from, held-out losses,
    size, and seconds of the process that ended it; the checksum stands as the reason of `sha256`.
    """
    own = cells.records[cells.records["task"] == "pretrain"]
    own = own.assign(row=own["record"], label=own["model"])
    knobs = pd.DataFrame([setting(config, "pretrain") or {} for config in own["config"]], own.index)
    knobs = knobs.reindex(columns=["steps", "batch", "accumulation", "max_length"]).astype(float)
    own = own.assign(steps=knobs["steps"], tokens=knobs.prod(axis=1, skipna=False))
    losses = cells.frames.lines("metric").query("metric == 'loss'")
    names = [f"loss.{text}" for text in losses["suite_task"].unique()]
    losses = losses.pivot(index="record", columns="suite_task", values="value").add_prefix("loss.")
    own = own.join(losses, on="record")
    facts = {"parameters": ["trainable"], "end": ["seconds"], "artifact": ["resumed_from_step", "sha256"]}
    for kind, columns in facts.items():
        lines = cells.frames.lines(kind).drop_duplicates("record", keep="last").set_index("record")
        own = own.join(lines.reindex(columns=columns), on="record")
    own = own.set_index([*ARM, "label"])
    wide = own[["steps", "tokens", *names, "trainable", "seconds", "resumed_from_step"]]
    return pd.concat([_long(wide), _long(own[["sha256"]]).rename(columns={"value": "reason"})])


def _of_records(cells: Cells) -> pd.DataFrame:
    """Every record's own seconds and memory, and how many errors it holds."""
    ends = _long(cells.frames.lines("end").set_index("record")[["seconds", "peak_rss_gib"]])
    errors = cells.frames.lines("error").groupby("record")["message"].agg(["size", "first"])
    errors = errors.set_axis(["value", "reason"], axis=1).reset_index().assign(quantity="errors")
    found = pd.concat([ends, errors]).assign(experiment="", cell="", task="")
    found["row"] = found["record"]
    return found.join(behind(found, ["row"]), on="row")
