"""What one command has measured, as text for the screen: its experiment ends with it (hydra_plugins/summary.py).

In: the records of its cells. Out: accuracy by method, time and memory by arm, how often experts change, and what is
missing and why. One seed has an interval over its items, and one process one over its rounds: neither says what the
next one would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from adafuse.records import Record
from adafuse.report import accuracy, build, membership
from adafuse.report.formats import GAP, count, digits
from adafuse.report.frames import Frames
from adafuse.report.measurements import KEY, Measured
from adafuse.stats import mean_interval, paired_ratio, share_interval

Ends = tuple[float, float, float]
PLACE, ROW = KEY[:2], KEY[:3]
NAMES = {"ms_per_token": "time", "accuracy.average": "accuracy"}


def summary(records: list[Record], experiment: str) -> str:
    """The whole text. Raises ValueError with one line if there is no sound record."""
    found = build(records, membership.of_headers(records).assign(experiment=experiment))
    parts = [*_checkpoints(found.frames), *_accuracies(found.frames)]
    parts += [*_times(found.frames, found.measured), *_changes(found.frames)]
    parts += _left_out(found.frames, found.measured)
    return "\n".join(parts)


def _checkpoints(frames: Frames) -> Iterator[str]:
    own = frames.lines("checkpoint").join(frames.runs["dtype"], on="record")
    for path, stored_in, dtype in own[["path", "stored_in", "dtype"]].drop_duplicates().to_numpy():
        yield f"backbone {path}: stored in {stored_in}, computed in {dtype}"


def _accuracies(frames: Frames) -> Iterator[str]:
    """By cell a table with a line a task and a column a method; in per cent."""
    own = accuracy.studies(frames)
    each: Any = accuracy.scored(frames, own)
    each["pair"] = [*zip(each["value"], each["n"], strict=True)]
    for place, cell in own.groupby(PLACE, sort=False):
        scores = each[(each[PLACE] == place).all(axis=1)]
        names, tasks = list(cell["row"].unique()), list(scores["task"].unique())
        if not tasks:
            continue
        by = scores.groupby(["row", "task"])["pair"].agg(list)
        found = {
            name: {task: _share(by[name, task]) for task in tasks if (name, task) in by} for name in names
        }
        lines = [
            [task, _items(scores, task), *(_percent(found[name].get(task)) for name in names)]
            for task in tasks
        ]
        if len(tasks) > 1:
            means = [_mean(scores[scores["row"] == name], found[name], len(tasks)) for name in names]
            lines.append(["mean", scores.drop_duplicates("task")["n"].sum(), *map(_percent, means)])
        trained = cell.drop_duplicates("row").set_index("row")["parameters"]
        lines.append(["trained parameters", "", *(GAP if pd.isna(n) else count(n) for n in trained[names])])
        seeds = cell["seed"].nunique()
        yield f"\naccuracy, % [95 %], {f'{seeds} seeds' if seeds > 1 else 'one seed, interval over items'}"
        yield tabulate(lines, ["task", "items", *names], disable_numparse=True)


def _items(scores: pd.DataFrame, task: str) -> Any:
    return scores.loc[scores["task"] == task, "n"].iloc[0]


def _share(of_seeds: list[tuple[float, int]]) -> Ends:
    """Over seeds; for one over its items."""
    return (
        mean_interval([value for value, _ in of_seeds]) if len(of_seeds) > 1 else share_interval(*of_seeds[0])
    )


def _mean(scores: pd.DataFrame, found: dict[str, Ends], tasks: int) -> Ends | None:
    """Over tasks; None for a method that lacks one. For one seed the tasks' half widths add up as variances do."""
    by_seed = scores.groupby("seed")["value"].agg(["mean", "size"]).query("size == @tasks")["mean"]
    if len(by_seed) != 1:
        return mean_interval(by_seed) if len(by_seed) else None
    value = by_seed.iloc[0]
    below, above = (
        math.sqrt(sum((ends[0] - ends[side]) ** 2 for ends in found.values())) / tasks for side in (1, 2)
    )
    return value, value - below, value + above


def _percent(found: Ends | None) -> str:
    return GAP if found is None else "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * own for own in found))


def _times(frames: Frames, measured: Measured) -> Iterator[str]:
    """By cell a line an arm: what a token takes, alone and beside the backbone, and what the arm holds."""
    values, counted = measured.values.set_index(ROW), _counted(frames)
    for cell in measured.cells:
        lines, place = [], (cell.experiment, cell.cell)
        for row in (row for row in measured.rows if (row.experiment, row.cell) == place and row.runtime):
            own: Any = values.loc[[(*place, row.row)]].set_index("quantity")
            if "ms_per_token" in own.index:
                processes = [
                    ms
                    for record, arm, ms in counted
                    if arm == row.row and record in own.at["ms_per_token", "records"]
                ]
                size = digits(1024 * own.at["weights_gib", "value"]) if "weights_gib" in own.index else GAP
                lines.append([row.label, _alone(processes), _ratio(own), size, sum(map(len, processes))])
        if lines:
            head = ["arm", "ms a token [95 %]", "times the backbone", "weights, MiB", "blocks"]
            yield f"\nlatency: {cell.title}\n{tabulate(lines, head, disable_numparse=True)}"


def _counted(frames: Frames) -> list[tuple[str, str, np.ndarray]]:
    """Of each record and arm the ms a token of the blocks that count."""
    blocks, flags, at = frames.lines("block"), frames.lines("flag"), ["record", "arm", "round"]
    flagged = pd.MultiIndex.from_frame(blocks[at]).isin(pd.MultiIndex.from_frame(flags[at]))
    own = blocks[blocks["excluded"].isna() & ~flagged]
    own = own.assign(ms=(own["block_ms"] / own["tokens"]).astype(float))
    groups: Any = own.groupby(at[:2])["ms"]
    return [(*key, ms.to_numpy()) for key, ms in groups]


def _alone(processes: list[np.ndarray]) -> str:
    if not processes:
        return GAP
    found = paired_ratio([(ms, np.ones_like(ms)) for ms in processes])
    return _ends(found.ratio, found.low, found.high)


def _ratio(own: Any) -> str:
    return _ends(*own.loc["ratio", ["value", "low", "high"]]) if "ratio" in own.index else ""


def _ends(value: float, low: float, high: float) -> str:
    return digits(value) if math.isnan(low) else f"{digits(value)} [{digits(low)}, {digits(high)}]"


def _changes(frames: Frames) -> Iterator[str]:
    """How long what a router has chosen stands: a strategy that merges would save what does not change."""
    for _, line in frames.lines("selections").drop_duplicates("method").iterrows():
        changed, lasts = np.mean(line["changed_share"]), np.mean(line["lasts_tokens"])
        routers = len(line["routers"])
        yield (
            f"{line['method']}: experts change at {changed:.0%} of tokens, a choice stands for {lasts:.1f} tokens"
            + (f" (mean over {routers} routers)" if routers > 1 else "")
        )


def _left_out(frames: Frames, measured: Measured) -> Iterator[str]:
    """What has no number, and why; what was set aside of the rest; errors."""
    values = measured.values
    absent = values[values["quantity"].isin(["ms_per_token", "accuracy.average"]) & values["value"].isna()]
    said = [
        f"{row} has no {NAMES[quantity]}: {why}"
        for row, quantity, why in absent[["row", "quantity", "reason"]].to_numpy()
    ]
    aside = values[(values["quantity"] == "left_out") & (values["value"] > 0)]
    said += [f"blocks set aside, {row}: {why}" for row, why in aside[["row", "reason"]].to_numpy()]
    for where, message in frames.lines("error")[["where", "message"]].drop_duplicates().to_numpy():
        if not any(message in line for line in said):
            said.append(f"{where}: {message}")
    yield from ["", "left out:", *(f"  {line}" for line in dict.fromkeys(said))] if said else []
