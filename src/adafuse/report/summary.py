"""What one command has measured, as text for the screen: its experiment ends with it (hydra_plugins/summary.py).

In: the records of its cells. Out: accuracy by method, time and memory by arm, how often experts change, and what is
missing and why. One seed has an interval over its items, and one process one over its rounds: neither says what the
next one would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from adafuse.records import Record
from adafuse.report import Report, accuracy, build, latency, membership
from adafuse.report.claims import Cell, cells
from adafuse.report.formats import GAP, count, digits
from adafuse.report.frames import Frames
from adafuse.report.measurements import KEY
from adafuse.report.rules import Number
from adafuse.stats import mean_interval, paired_ratio, share_interval

PLACE = KEY[:2]
NAMES = {"ms_per_token": "time", "accuracy.average": "accuracy"}


def summary(records: list[Record], experiment: str) -> str:
    """The whole text. Raises ValueError with one line if there is no sound record."""
    found = build(records, membership.of_headers(records).assign(experiment=experiment))
    parts = [*_checkpoints(found.frames), *_accuracies(found.frames), *_times(found)]
    return "\n".join([*parts, *_changes(found.frames), *_left_out(found)])


def _checkpoints(frames: Frames) -> Iterator[str]:
    own = frames.lines("checkpoint").join(frames.runs["dtype"], on="record")
    for path, stored_in, dtype in own[["path", "stored_in", "dtype"]].drop_duplicates().to_numpy():
        yield f"backbone {path}: stored in {stored_in}, computed in {dtype}"


def _accuracies(frames: Frames) -> Iterator[str]:
    """By cell a table with a line a task and a column a method; in per cent."""
    own = accuracy.studies(frames)
    scores = accuracy.scored(frames, own)
    for place, cell in own.groupby(PLACE, sort=False):
        here, rows = scores[(scores[PLACE] == place).all(axis=1)], cell["row"].unique()
        if here.empty:
            continue
        items = here.groupby("task", sort=False)["n"].first()
        by_task = here.groupby(["task", "row"])[["value", "n"]].apply(_share)
        table: Any = by_task.unstack("row").reindex(items.index, columns=rows)
        if len(table) > 1:
            table.loc["mean"] = [_mean(here[here["row"] == row], table[row]) for row in rows]
            items["mean"] = items.sum()
        table = table.map(lambda own: "{:.0f} [{:.0f}, {:.0f}]".format(*own), na_action="ignore")
        trained = cell.drop_duplicates("row").set_index("row")["parameters"]
        table.loc["trained parameters"] = trained.map(count, na_action="ignore")
        table.insert(0, "items", items.map(str).reindex(table.index, fill_value=""))
        seeds = cell["seed"].nunique()
        yield f"\naccuracy, % [95 %], {f'{seeds} seeds' if seeds > 1 else 'one seed, interval over items'}"
        yield tabulate(table.fillna(GAP), ["task", *table], disable_numparse=True)


def _share(seeds: pd.DataFrame) -> Any:
    """Of one task, over seeds; for one over its items."""
    several = len(seeds) > 1
    ends = mean_interval(seeds["value"]) if several else share_interval(*seeds[["value", "n"]].iloc[0])
    return tuple(100 * end for end in ends)


def _mean(scores: pd.DataFrame, tasks: pd.Series) -> Any:
    """Over tasks; nothing for a method that lacks one. For one seed the tasks' half widths add up as variances do."""
    by_seed = scores.groupby("seed")["value"].agg(["mean", "size"]).query("size == @tasks.size")["mean"] * 100
    if len(by_seed) != 1:
        return mean_interval(by_seed) if len(by_seed) else None
    value, low, high = np.array(tasks.tolist()).T
    below, above = (math.sqrt(((value - end) ** 2).sum()) / len(tasks) for end in (low, high))
    return value.mean(), value.mean() - below, value.mean() + above


def _times(found: Report) -> Iterator[str]:
    """By cell a line an arm: what a token takes, alone and beside the backbone, and what the arm holds."""
    blocks: Any = latency.counted(found.frames).groupby(["arm", "record"])["ms"]
    for cell in cells(found.measured, found.frames.runs):
        arms = [row for row, own in cell.found.items() if "ms_per_token" in own]
        if lines := [_arm(cell, arm, blocks) for arm in arms]:
            head = ["arm", "ms a token [95 %]", "times the backbone", "weights, MiB", "blocks"]
            yield f"\nlatency: {cell.name.title}\n{tabulate(lines, head, disable_numparse=True)}"


def _arm(cell: Cell, arm: str, blocks: Any) -> list[Any]:
    """One process has an interval over its rounds, several one over processes."""
    time, over, size = (cell.number(arm, name) for name in ("ms_per_token", "ratio", "weights_gib"))
    own = [ms.to_numpy() for (row, record), ms in blocks if row == arm and record in time.records]
    alone = Number(*astuple(paired_ratio([(ms, ms**0) for ms in own]))[:3]) if own else Number()
    beside = _ends(over) if "ratio" in cell.found[arm] else ""
    return [cell.row(arm).label, _ends(alone), beside, digits(1024 * size.value), sum(map(len, own))]


def _ends(own: Number) -> str:
    interval = "" if math.isnan(own.low) else f" [{digits(own.low)}, {digits(own.high)}]"
    return digits(own.value) + interval


def _changes(frames: Frames) -> Iterator[str]:
    """How long what a router has chosen stands: a strategy that merges would save what does not change."""
    for _, line in frames.lines("selections").drop_duplicates("method").iterrows():
        changed, lasts = np.mean(line["changed_share"]), np.mean(line["lasts_tokens"])
        routers = len(line["routers"])
        said = f"{line['method']}: experts change at {changed:.0%} of tokens, a choice stands for {lasts:.1f} tokens"
        yield said + f" (mean over {routers} routers)" * (routers > 1)


def _left_out(found: Report) -> Iterator[str]:
    """What has no number, and why; what was set aside of the rest; errors."""
    values = found.measured.values.assign(name=found.measured.values["quantity"].map(NAMES))
    absent = values[values["name"].notna() & values["value"].isna()]
    said = [f"{row} has no {name}: {why}" for row, name, why in absent[["row", "name", "reason"]].to_numpy()]
    aside = values[(values["quantity"] == "left_out") & (values["value"] > 0)]
    said += [f"blocks set aside, {row}: {why}" for row, why in aside[["row", "reason"]].to_numpy()]
    for where, message in found.frames.lines("error")[["where", "message"]].drop_duplicates().to_numpy():
        if not any(message in line for line in said):
            said.append(f"{where}: {message}")
    yield from ["", "left out:", *(f"  {line}" for line in dict.fromkeys(said))] if said else []
