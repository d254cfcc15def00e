"""What everything is called: cells by key and by title, where numbers come from, arms and methods in their order.

In: rows of `Frames.runs`. Out: words. Nothing is found by these words; they are printed, and a key is compared as a
whole. Next: latency.py, accuracy.py.

    cell_key(run)    # h200 llama2_7b bf16 all r16 b1 c64 paper
    title(run)       # NVIDIA H200 · llama2_7b, bfloat16 · 8 experts of rank 16, top-2, on q, k, v, o, ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import pandas as pd

from adafuse.report.formats import rendered
from adafuse.report.frames import BEFORE, setting

ORDER = ("base", "full", "lora", "mola", "moral", "pesc", "mixlora", "adafuse_layerwise", "adafuse")
BASE, LORA, ADAFUSE, TWIN = "base", "lora", "adafuse", "adafuse_layerwise"
# what a step of training is timed beside
PEFT = "peft_lora"
BUDGETS = {"published": "published sizes", "equal": "equal parameters"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ALL_LINEARS = "q, k, v, o, gate, up, down"

# What a cell's key holds, by task: records that share it are replicates where they share an experiment.
GEOMETRY = ("targets", "rank", "count", "top_k")
WORKLOAD = (
    "batch",
    "context",
    "arms",
    "gates",
    "bypass_share",
    "queries",
    "trained_adapters",
    "blocks_per_decision",
)
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("latency", "trace"), ("dtype", *GEOMETRY, *WORKLOAD)),
    "memory": ("dtype", *GEOMETRY, "batch", "context"),
    "layer": ("dtype", "count", "top_k", "ranks"),
    "kernel": ("dtype", "count", "top_k"),
    # several dtypes are one cell
    "drift": GEOMETRY,
    "fit_speed": ("dtype", *GEOMETRY),
    **dict.fromkeys(("train", "evaluate"), ("dtype", *GEOMETRY, "data", "level", "budget")),
    "pretrain": ("dtype",),
}
# how a part of a key is written, and what is left out of it
LETTERS = {"rank": "r", "count": "x", "top_k": "top", "batch": "b", "context": "c", "level": "level"}
MARKS = LETTERS | {
    "blocks_per_decision": "decision/",
    "ranks": "r",
    "gates": "gates=",
    "bypass_share": "bypass=",
    "queries": "queries=",
}
USUAL = BEFORE | {"count": 8, "top_k": 2}


class Arm(NamedTuple):
    """What an arm is called and what it is."""

    label: str
    method: str
    routing: str
    strategy: str
    runtime: str
    # of its code; records that do not say are from before any was mended
    version: int


def cell_key(run: pd.Series, swept: Collection[str] = ()) -> str:
    """The short name of a run's cell: without what is as usual, and with * for what its experiment sweeps."""
    names = [
        name for name in KEYS[run["task"]] if name not in USUAL or run[name] != USUAL[name] or name in swept
    ]
    words = {"dtype": DTYPES.get(run["dtype"]), "queries": run["block_tokens"], "trained_adapters": "trained"}
    words |= {"bypass_share": f"{run['bypass_share']:g}", "targets": run["targets"].replace(", ", "")}
    words |= {"targets": "all"} if run["targets"] == ALL_LINEARS else {}
    words |= dict.fromkeys(swept, "*")
    parts = [f"{MARKS.get(name, '')}{words.get(name) or run[name]}".replace(", ", ",") for name in names]
    return " ".join([run["folder"], run["model"], *parts])


def title(run: pd.Series) -> str:
    """The heading of a cell: machine, backbone, experts, and the workload of a decode or the data of a study."""
    return rendered("title", budgets=BUDGETS, **run)


def caption(runs: pd.DataFrame) -> str:
    """Where the numbers of these records come from: processor, libraries, profile, commit, what was left out."""
    every = list[Any](
        runs[["machine", "driver", "commit", "dirty", "status", "name"]].itertuples(index=False)
    )
    cards = [f"{run.machine}, driver {run.driver}" for run in every if run.driver]
    sources = [str(run.commit or "unknown")[:12] + " (dirty)" * bool(run.dirty) for run in every]
    left = [run.name for run in every if run.status == "unfinished"]
    older = Counter(arm for _, arm in sorted(outdated(runs)))
    count = len(runs) - len(left)
    parts = [" and ".join(sorted(set(runs["host"]))), _distinct(cards), f"torch {_distinct(runs['torch'])}"]
    parts += [f"profile {_distinct(runs['profile'])}", f"commit {_distinct(sources)}"]
    hosts = runs.loc[runs["status"] != "unfinished", "host_id"].nunique()
    parts += [f"{count} record{'s' * (count != 1)} of {hosts} host{'s' * (hosts != 1)}"]
    parts += [f"left out as unfinished: {', '.join(left)}"] if left else []
    told = ", ".join(f"{arm} of {n} record{'s' * (n != 1)}" for arm, n in older.items())
    parts += [f"left out for a newer version of the arm's code: {told}"] if older else []
    return " · ".join(filter(None, parts))


def arms_of(run: pd.Series) -> dict[str, Arm]:
    """Every arm that a run was to time, in order, by the record's table of arms; of a training step the method."""
    found, config = {}, run["config"]
    fitted = [setting(config, "method.name")] if run["task"] == "fit_speed" else None
    for name in fitted or setting(config, "arms.run") or []:
        own = {"label": name, "runtime": "eager"} | (setting(config, f"arms.table.{name}") or {})
        own["routing"] = setting(config, f"methods.{own.get('method')}.routing")
        own["version"] = run["arm_versions"].get(name, 1)
        found[name] = Arm._make(own.get(what) or "" for what in Arm._fields)
    return found


def outdated(runs: pd.DataFrame) -> set[tuple[str, str]]:
    """(record, arm) of a cell's runs where the arm's code has another version than the newest that one finished with:
    versions of an arm are never pooled. With a method's older steps of training goes what they were timed beside.
    """
    if not runs["arm_versions"].any():
        return set()
    arms = {run["record"]: (run["status"] != "unfinished", arms_of(run)) for _, run in runs.iterrows()}
    newest = dict[str, int]()
    for finished, own in arms.values():
        newest |= {name: max(arm.version, newest.get(name, 1)) for name, arm in own.items() if finished}
    older = {
        (record, name)
        for record, (_, own) in arms.items()
        for name, arm in own.items()
        if arm.version != newest.get(name, arm.version)
    }
    beside = set(runs.loc[runs["task"] == "fit_speed", "record"])
    return older | {(record, PEFT) for record, _ in older if record in beside}


def rank(row: str) -> tuple[int, str]:
    """Where a method stands in a table; its further settings, `method (setting=value)`, follow it."""
    own = row.split(" ")[0]
    return (ORDER.index(own) if own in ORDER else len(ORDER)), row


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}))
