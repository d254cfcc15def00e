"""What everything is called: cells by key and by title, where numbers come from, arms and methods in their order.

In: a row of `Frames.runs`, or hashes of records. Out: words. Nothing is found by these words; they are printed, and a
key is compared as a whole. Next: latency.py, accuracy.py.

    runs = found.runs.loc[hashes]
    cell_key(runs.iloc[0])    # h200 llama2_7b bf16 all r16 x8 top2 b1 c64 paper
    title(runs.iloc[0])       # NVIDIA H200 · llama2_7b, bfloat16 · 8 experts of rank 16, top-2, on q, k, v, o, ...
    heading(runs.iloc[0])     # the same of a study of accuracy, with its data and its budget
    caption(runs)             # processor, driver, torch, profile, commit, records, what was left out
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import pandas as pd

ORDER = ("base", "full", "lora", "mola", "moral", "pesc", "mixlora", "adafuse_layerwise", "adafuse")
BASE, LORA, ADAFUSE, TWIN = "base", "lora", "adafuse", "adafuse_layerwise"
# what AdaFuse's accuracy is held against, as every table and sentence calls it
OPPONENTS = {TWIN: "a gate per layer", LORA: "plain LoRA", "mola": "MoLA"}
BUDGETS = {"published": "published sizes", "equal": "equal parameters"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
EAGER = "eager"
ALL_LINEARS = "q, k, v, o, gate, up, down"

# What a cell's key holds, by task: records that share it are replicates where they share an experiment.
GEOMETRY = ("targets", "rank", "count", "top_k")
WORKLOAD = ("batch", "context", "arms", "gates", "bypass_share", "queries", "trained_adapters")
KEYS: dict[str, tuple[str, ...]] = {
    "latency": ("dtype", *GEOMETRY, *WORKLOAD),
    "trace": ("dtype", *GEOMETRY, *WORKLOAD),
    "memory": ("dtype", *GEOMETRY, "batch", "context"),
    "layer": ("dtype", "count", "top_k", "ranks"),
    "kernel": ("dtype", "count", "top_k"),
    # several dtypes are one cell
    "drift": GEOMETRY,
    "train": ("dtype", *GEOMETRY, "data", "level", "budget"),
    "evaluate": ("dtype", *GEOMETRY, "data", "level", "budget"),
    "pretrain": ("dtype",),
}
# how a part of a key is written, and what is left out of it
LETTERS = {"rank": "r", "count": "x", "top_k": "top", "batch": "b", "context": "c", "level": "level"}
USUAL = {"gates": "router", "bypass_share": 0.0, "queries": False, "trained_adapters": False}
UNUSUAL = {
    "gates": "gates={}",
    "bypass_share": "bypass={:g}",
    "queries": "queries={1}",
    "trained_adapters": "trained",
}


class Arm(NamedTuple):
    """What an arm is called and what it is."""

    label: str
    method: str
    routing: str
    strategy: str
    runtime: str


def cell_key(run: pd.Series, without: Collection[str] = ()) -> str:
    """The short name of a run's cell; columns in `without` (of a sweep, say) have no part in it."""
    names = [name for name in KEYS[run["task"]] if name not in without]
    words = [run["folder"], run["model"], *(_word(run, name) for name in names)]
    return " ".join(word for word in words if word)


def title(run: pd.Series) -> str:
    """The heading of a cell: machine, backbone, expert geometry, and the workload of a latency cell."""
    task = run["task"]
    # a drift cell holds several
    dtype = "" if task == "drift" else f", {run['dtype']}"
    rank = "" if task in ("layer", "kernel") else f" of rank {run['rank']}"
    where = {"layer": ", on one linear", "kernel": ""}.get(task, f", on {run['targets']}")
    parts = [
        run["machine"],
        f"{run['model']}{dtype}",
        f"{run['count']} experts{rank}, top-{run['top_k']}{where}",
    ]
    if task == "layer":
        parts.append("rank " + ", ".join(map(str, _ranks(run))))
    if task in ("latency", "memory", "trace"):
        parts += [f"batch {run['batch']}", f"context {run['context']}", *_unusual(run)]
        parts.append("memory only" if task == "memory" else f"arms={run['arms']}")
    return " · ".join(parts)


def heading(run: pd.Series) -> str:
    """The title of a study of accuracy: its cell, its data, and how the sizes of the methods were chosen."""
    level = f", level {run['level']}" if run["level"] != 1 else ""
    return " · ".join(
        [title(run), f"data {run['data']}{level}", BUDGETS.get(run["budget"], str(run["budget"]))]
    )


def caption(runs: pd.DataFrame) -> str:
    """Where the numbers of these records come from: processor, libraries, profile, commit, what was left out."""
    parts = [_distinct(runs["host"], " and ")]
    drivers = [
        f"{gpu}, driver {driver}"
        for gpu, driver in zip(runs["machine"], runs["driver"], strict=True)
        if driver
    ]
    parts += [_distinct(drivers)] if drivers else []
    parts.append(f"torch {_distinct(runs['torch'])}")
    parts.append(f"profile {_distinct(runs['profile'])}")
    parts.append(f"commit {_distinct(map(commit_text, runs['commit'], runs['dirty']))}")
    left = runs.loc[runs["status"] == "unfinished", "name"]
    count = len(runs) - len(left)
    parts.append(f"{count} record" + ("" if count == 1 else "s"))
    if len(left):
        parts.append(f"left out as unfinished: {', '.join(left)}")
    return " · ".join(parts)


def commit_text(commit: str | None, dirty: bool | None) -> str:
    """The commit that made a record, in 12 digits; a record of other sources says so."""
    return str(commit or "unknown")[:12] + (" (dirty)" if dirty else "")


def arms_of(run: pd.Series) -> dict[str, Arm]:
    """Every arm that a run was to time, in order, by the record's own table of arms."""
    config = run["config"]
    arms, methods = config.get("arms") or {}, config.get("methods") or {}
    found = {}
    for name in arms.get("run") or []:
        own = (arms.get("table") or {}).get(name) or {}
        routing = (methods.get(own.get("method")) or {}).get("routing", "")
        words = (own.get("method", ""), routing, own.get("strategy", ""), own.get("runtime", EAGER))
        found[name] = Arm(own.get("label", name), *words)
    return found


def rank(row: str) -> tuple[int, str]:
    """Where a method stands in a table; its further settings, `method (setting=value)`, follow it."""
    own = row.split(" ")[0]
    return (ORDER.index(own) if own in ORDER else len(ORDER)), row


def _word(run: pd.Series, name: str) -> str:
    """One part of a key; empty for what is as usual."""
    if name == "ranks":
        return "r" + ",".join(map(str, _ranks(run)))
    value = run[name]
    if name == "targets":
        return "all" if value == ALL_LINEARS else value.replace(", ", "")
    if name == "dtype":
        return DTYPES.get(value, str(value))
    if name in LETTERS:
        return f"{LETTERS[name]}{value}"
    if name in USUAL:
        return "" if value == USUAL[name] else UNUSUAL.get(name, "{}").format(value, run["block_tokens"])
    return str(value)


def _ranks(run: pd.Series) -> list[int]:
    return list((run["config"].get("layer") or {}).get("ranks") or [])


def _unusual(run: pd.Series) -> list[str]:
    """What of a workload is not as usual: a table of gates, tokens without experts, or whole queries."""
    said = [f"gates {run['gates']}"] if run["gates"] != "router" else []
    said += [f"{100 * run['bypass_share']:g} % of tokens bypassed"] if run["bypass_share"] else []
    return [*said, f"whole queries of {run['block_tokens']} new tokens"] if run["queries"] else said


def _distinct(values: Iterable[object], between: str = ", ") -> str:
    return between.join(sorted({str(value) for value in values}))
