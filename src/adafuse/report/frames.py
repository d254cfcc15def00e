"""Records as tidy frames, the one source of every number in the report.

In: records of any status and the membership of experiments. Out: `Frames`. Next: naming.py, latency.py, accuracy.py.

    found = frames(load(["results/reference"]), membership.read("results/membership.csv"))
    found.runs.loc["f2ffe3127139", "model"]                # one row a record, settings filled in where it is older
    found.members.query("experiment == 'rank'")            # one row for each record of an experiment, joined with runs
    found.lines("metric").merge(found.members, on="record")  # all lines of a kind in the finished records
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from adafuse.records import FIELDS, Record
from adafuse.report import membership as memberships

Json = dict[str, Any]
# What records were made with that are older than a setting.
BEFORE: Json = {
    "evaluate_strategy": "dense",
    "evaluate_dtype": "float32",
    "evaluate_restore": True,
    "budget": "published",
}
# The same of a method's settings; `method_settings` leaves them out where they are this, as if all records were old.
LATER: Json = {
    "router_norm": False,
    "null_expert": False,
    "bypass_penalty": 0.0,
    "first_expert_block": 0,
    "learning_rate_factor": 1.0,
    "full": False,
}
NEEDED = {kind: frozenset(names) for kind, names in FIELDS.items()}


# two are the same only if they are one: what is derived from one is kept by it
@dataclass(eq=False)
class Frames:
    """Everything that was read.

    `records`: the records with a sound header, by hash. `runs`: their headers, a row each, indexed by hash. `members`:
    membership joined with `runs`, a row for each (experiment, record), with `record` as a column. `unlisted`: hashes of
    records that no row of the membership names; they serve the experiment of their own header. `left_out`: file name
    and reason of what cannot be read as a record at all.
    """

    records: dict[str, Record]
    runs: pd.DataFrame
    members: pd.DataFrame
    unlisted: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    # by kind and record
    _of_kind: dict[str, dict[str, list[Json]]] = field(default_factory=dict)
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict)

    def lines(self, kind: str) -> pd.DataFrame:
        """All lines of one kind in the finished records, in their order, with `record` as the first column."""
        if kind not in self._frames:
            of_kind = self._of_kind.get(kind, {})
            found = [(record, line) for record, own in of_kind.items() for line in own]
            names = dict.fromkeys([*FIELDS[kind], *(name for _, line in found for name in line)])
            names.pop("kind", None)
            columns = {name: [line.get(name) for _, line in found] for name in names}
            # without lines no column is one of numbers, which text could not be joined with
            dtype = None if found else object
            self._frames[kind] = pd.DataFrame(
                {"record": [record for record, _ in found], **columns}, dtype=dtype
            )
        return self._frames[kind]

    def of(self, kind: str, record: str) -> list[Json]:
        """The lines of one kind in one finished record, as they were written."""
        return self._of_kind.get(kind, {}).get(record, [])


def frames(records: Iterable[Record], membership: pd.DataFrame | None = None) -> Frames:
    """Tidy frames of `records`; without a membership each record serves the experiment that its header names.

    Raises ValueError with one line if there is no sound record.
    """
    sound: dict[str, Record] = {}
    rows: dict[str, Json] = {}
    left_out: dict[str, str] = {}
    of_kind: dict[str, dict[str, list[Json]]] = {}
    for record in records:
        key = memberships.hash_of(record.path)
        try:
            if key in sound:
                raise ValueError(f"a second record of the name {key}")
            lines, rows[key] = _lines(record), _run(record)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "its header is that of no record"
            left_out[file_name(record)] = reason
            continue
        sound[key] = record
        for line in lines if record.status != "unfinished" else ():
            of_kind.setdefault(line["kind"], {}).setdefault(key, []).append(line)
    if not sound:
        said = "".join(f"; left out: {name}, {reason}" for name, reason in left_out.items())
        raise ValueError(f"no records found: run `make reproduce` first, or pass another folder{said}")
    runs = pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="record"), dtype=object)
    # a machine's short name that stands for several processors tells them apart
    alone = runs.groupby("folder")["cpu"].transform("nunique") <= 1
    runs["folder"] = runs["folder"].where(alone, runs["folder"] + "/" + runs["cpu"].astype(str))
    own = memberships.of_headers(sound.values())
    listed = own if membership is None else membership
    unlisted = sorted(set(sound) - set(listed["record"]))
    listed = pd.concat([listed, own[own["record"].isin(unlisted)]]).sort_values(memberships.COLUMNS)
    members = listed.drop(columns=["profile", "task"]).join(runs, on="record", how="inner")
    return Frames(sound, runs, members.reset_index(drop=True), unlisted, left_out, of_kind)


def method_settings(method: Json) -> Json:
    """The settings of a method without those that older records lack and that are as they were before."""
    return {name: value for name, value in method.items() if name not in LATER or value != LATER[name]}


def file_name(record: Record) -> str:
    """Folder and file name: enough to find the record, the same on every machine."""
    return f"{record.path.parent.name}/{record.path.name}"


def _lines(record: Record) -> list[Json]:
    """All lines. Raises ValueError for one that no record has."""
    if not record.run:
        raise ValueError("unfinished, killed before its first line")
    lines: list[Json] = record.lines
    for line in lines:
        kind = line.get("kind") if isinstance(line, dict) else None
        if kind not in NEEDED or not NEEDED[kind] <= line.keys():
            raise ValueError(f"damaged: no record has this line: {str(line)[:60]}")
    return lines


def _run(record: Record) -> Json:
    """One row of `runs`."""
    run, config = record.run, record.run["config"]
    machine, versions = run["machine"], run.get("versions") or {}
    model, experts, knobs = config["model"], config.get("experts") or {}, config.get("latency") or {}
    data, suite, arms = config.get("data") or {}, config.get("suite") or {}, config.get("arms") or {}
    path = model.get("path")
    return {
        "name": file_name(record),
        "status": record.status,
        **{name: run.get(name) for name in ("task", "profile", "commit", "dirty")},
        "seed": run.get("seed") or 0,
        "replicate": run.get("replicate") or 0,
        "machine": machine.get("gpu") or "CPU",
        "folder": str(machine.get("name")),
        "host": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB",
        "cpu": machine.get("cpu"),
        "cores": machine.get("cores"),
        "driver": machine.get("driver"),
        "torch": versions.get("torch"),
        "python": versions.get("python"),
        "model": Path(path).name if path else str(model.get("name")),
        "path": path,
        "dtype": model.get("dtype"),
        "shape": model.get("shape") or {},
        "targets": ", ".join(str(name).removesuffix("_proj") for name in experts.get("targets") or []),
        **{name: experts.get(name) for name in ("rank", "count", "top_k")},
        "batch": config.get("batch"),
        "context": config.get("context"),
        "arms": arms.get("name"),
        "gates": knobs.get("gates", "router"),
        "bypass_share": knobs.get("bypass_share", 0.0),
        "queries": bool(knobs.get("queries", False)),
        "block_tokens": knobs.get("block_tokens"),
        "trained_adapters": bool(knobs.get("trained_adapters", False)),
        "method": (config.get("method") or {}).get("name"),
        "data": Path(data["path"]).name if data.get("path") else data.get("name"),
        "level": data.get("level", 1),
        "families": ", ".join(data.get("families") or []),
        "train_items": data.get("train_items"),
        "suite": suite.get("name"),
        "strategy": config.get("evaluate_strategy", BEFORE["evaluate_strategy"]),
        "evaluate_dtype": config.get("evaluate_dtype", BEFORE["evaluate_dtype"]),
        "restored": config.get("evaluate_restore", BEFORE["evaluate_restore"]),
        "budget": config.get("budget", BEFORE["budget"]),
        "learning_rate": (config.get("train") or {}).get("learning_rate"),
        "config": config,
    }
