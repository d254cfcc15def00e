"""From records to cells: records of one thing, what they are called, and which round holds which time.

In: records of any status. Out: a list of `Cell`, each a set of replicates of one thing that was measured, in
a fixed order. Next: timing.py for latency cells, accuracy.py for studies, layers.py for single layers,
kernels.py and drift.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from adafuse.frames import counted_blocks
from adafuse.records import Record
from adafuse.report.pooling import backbone_key, pooling_key

BACKBONE = "base"


@dataclass(frozen=True)
class Cell:
    """Records that differ only in seed and replicate; every number in one row comes from one cell."""

    records: tuple[Record, ...]
    # of the same workload, measured apart: report/memory.py
    memory: tuple[Record, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.records[0].run["config"])

    @property
    def machine(self) -> dict[str, Any]:
        return dict(self.records[0].run["machine"])

    @property
    def is_cpu(self) -> bool:
        return not self.machine.get("gpu")

    @property
    def finished(self) -> list[Record]:
        """Records that may give numbers: an unfinished one may still change."""
        return [record for record in self.records if record.status != "unfinished"]

    @cached_property
    def rounds(self) -> dict[str, pd.DataFrame]:
        """For each record: ms per token, one row a round, one column an arm, without excluded and flagged blocks."""
        found = {}
        for record in self.finished:
            blocks = counted_blocks(record)
            if len(blocks):
                times = blocks.assign(ms_per_token=blocks["block_ms"] / blocks["tokens"])
                found[short_name(record)] = times.pivot_table(
                    index="round", columns="arm", values="ms_per_token"
                )
        return found

    def of(self, kind: str) -> list[tuple[Record, dict[str, Any]]]:
        """Every line of one kind in the finished records, each with its record."""
        return [(record, line) for record in self.finished for line in record.of(kind)]


def cells(records: list[Record], task: str) -> list[Cell]:
    """Group the records of one task into cells: GPUs first, then by title."""
    groups: dict[str, list[Record]] = {}
    own = [record for record in records if record.run.get("task") == task]
    shared = [record for record in own if task == "evaluate" and method_name(record) == BACKBONE]
    for record in own:
        if record not in shared:
            groups.setdefault(pooling_key(record), []).append(record)
    for record in shared:
        # The plain backbone is measured once for all adapters that stand on it, however they were trained.
        homes = [key for key, group in groups.items() if backbone_key(group[0]) == backbone_key(record)]
        for key in homes or [pooling_key(record)]:
            groups.setdefault(key, []).append(record)
    found = {key: Cell(tuple(group)) for key, group in groups.items()}
    return [found[key] for key in sorted(found, key=lambda key: (found[key].is_cpu, title(found[key]), key))]


def base_key(cell: Cell) -> str:
    """Cells that share it differ in their set of arms only."""
    return pooling_key(cell.records[0], with_arms=False)


def title(cell: Cell) -> str:
    """The heading of a section: machine, backbone, expert geometry, and the workload of a latency cell."""
    config, experts = cell.config, cell.config.get("experts", {})
    machine = "CPU" if cell.is_cpu else str(cell.machine["gpu"])
    task = cell.records[0].run["task"]
    # a drift cell holds several
    dtype = "" if task == "drift" else f", {config.get('model', {}).get('dtype')}"
    parts = [machine, model_name(config) + dtype]
    targets = ", ".join(str(name).removesuffix("_proj") for name in experts.get("targets", []))
    rank = "" if task in ("layer", "kernel") else f" of rank {experts.get('rank')}"
    where = {"layer": ", on one linear", "kernel": ""}.get(task, f", on {targets}")
    parts.append(f"{experts.get('count')} experts{rank}, top-{experts.get('top_k')}{where}")
    if task == "layer":
        knobs = config.get("layer", {})
        parts.append("rank " + ", ".join(map(str, knobs.get("ranks", []))))
    if task in ("latency", "memory"):
        parts += [f"batch {config.get('batch')}", f"context {config.get('context')}", *_workload(config)]
        parts.append("memory only" if task == "memory" else f"arms={config.get('arms', {}).get('name')}")
    return " · ".join(parts)


def _workload(config: dict[str, Any]) -> list[str]:
    """What is not as usual: a table of gates, tokens without experts, or whole queries."""
    knobs = config.get("latency", {})
    gates, share = knobs.get("gates", "router"), knobs.get("bypass_share", 0.0)
    said = [f"gates {gates}"] if gates != "router" else []
    said += [f"{100 * share:g} % of tokens bypassed"] if share else []
    queries = f"whole queries of {knobs.get('block_tokens')} new tokens"
    return [*said, queries] if knobs.get("queries") else said


def caption(cell: Cell) -> str:
    """Where the numbers come from: processor, libraries, profile, commit, and what was left out."""
    parts = [_distinct(cell, _host, " and ")]
    if not cell.is_cpu:
        parts.append(
            _distinct(cell, lambda record: "{gpu}, driver {driver}".format_map(record.run["machine"]))
        )
    parts.append("torch " + _distinct(cell, lambda record: str(record.run.get("versions", {}).get("torch"))))
    parts.append("profile " + _distinct(cell, lambda record: str(record.run.get("profile"))))
    parts.append("commit " + _distinct(cell, _commit))
    count = len(cell.finished)
    parts.append(f"{count} record" + ("" if count == 1 else "s"))
    unfinished = [short_name(record) for record in cell.records if record.status == "unfinished"]
    if unfinished:
        parts.append(f"left out as unfinished: {', '.join(unfinished)}")
    return " · ".join(parts)


def short_name(record: Record) -> str:
    """Folder and file name: enough to find the record, the same on every machine."""
    return f"{record.path.parent.name}/{record.path.name}"


def model_name(config: dict[str, Any]) -> str:
    """The backbone's name; a local folder's own name."""
    model = config.get("model", {})
    return Path(model["path"]).name if model.get("path") else str(model.get("name"))


def method_name(record: Record) -> str:
    """The method that an evaluate or train record is about."""
    return str(record.run["config"].get("method", {}).get("name"))


def first_error(records: list[Record], word: str = "") -> str | None:
    """The first error line, of those whose place or text names `word`."""
    for record in records:
        for line in record.of("error"):
            if re.search(rf"\b{re.escape(word)}\b", f"{line['where']} {line['message']}") or not word:
                return f"error: {line['message']}"
    return None


def why_empty(cell: Cell, kind: str) -> str:
    """Why a cell gives no line of a kind."""
    if not cell.finished:
        return "unfinished record: run the same command again"
    return first_error(cell.finished) or f"no {kind} line in the record"


def _host(record: Record) -> str:
    machine = record.run["machine"]
    return f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"


def _commit(record: Record) -> str:
    commit = str(record.run.get("commit") or "unknown")[:12]
    return f"{commit} (dirty)" if record.run.get("dirty") else commit


def _distinct(cell: Cell, of: Callable[[Record], str], between: str = ", ") -> str:
    return between.join(sorted({of(record) for record in cell.records}))
