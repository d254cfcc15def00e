"""Records as tidy frames, the one source of every number in the report.

In: records of any status and the membership of experiments. Out: `Frames`. Next: naming.py, latency.py, accuracy.py.

    found = frames(archive.load(["results/reference"]).records, membership.read("results/membership.csv"))
    found.lines("metric").merge(found.members.query("experiment == 'rank'"), on="record")
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from adafuse.records import FIELDS, Record, card
from adafuse.report import membership as memberships

Json = dict[str, Any]
# What records were made with that are older than a setting: of a whole configuration, and of a method.
BEFORE: Json = {"strategy": "dense", "evaluate_dtype": "float32", "restored": True, "budget": "published"}
BEFORE |= {"gates": "router", "bypass_share": 0.0, "queries": False, "trained_adapters": False, "level": 1}
BEFORE |= {"blocks_per_decision": 0}
LATER: Json = {"router_norm": False, "null_expert": False, "bypass_penalty": 0.0, "first_expert_block": 0}
LATER |= {"learning_rate_factor": 1.0, "full": False, "blocks_per_decision": 0, "router_block": 0}
# Columns of `Frames.runs`, by where they stand in a configuration.
SETTINGS = {"": ["batch", "context", "evaluate_dtype", "budget"], "model.": ["path", "dtype", "shape"]}
SETTINGS |= {"experts.": ["rank", "count", "top_k"], "data.": ["level", "train_items"]}
SETTINGS |= {"latency.": ["gates", "bypass_share", "queries", "block_tokens", "trained_adapters"]}
SETTINGS |= {"methods.adafuse.": ["blocks_per_decision"]}
PATHS = {name: group + name for group, names in SETTINGS.items() for name in names}
PATHS |= {"strategy": "evaluate_strategy", "restored": "evaluate_restore"}
PATHS |= {"arms": "arms.name", "method": "method.name"}


# two are the same only if they are one: what is derived from one is kept by it
@dataclass(eq=False)
class Frames:
    """`records`: those with a sound header, by key (`key_of`).
    `runs`: their headers, a row each, indexed by key; `withdrawn` is why, and `wrong` are the tasks by which it is.
    `members`: membership joined with `runs`, a row for each (experiment, record), without withdrawn ones that were
    measured anew. `unlisted`: records that no row of the membership names; they serve the experiment of their own
    header. `left_out`: what is no record, and why.
    """

    records: dict[str, Record]
    runs: pd.DataFrame
    members: pd.DataFrame
    unlisted: list[str]
    left_out: dict[str, str]
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict)

    def lines(self, kind: str, task: str = "") -> pd.DataFrame:
        """All lines of one kind in the finished records (of one task), in their order, with the column `record`."""
        if kind not in self._frames:
            own = self._texts[kind]
            lines = json.loads(b"[" + b",".join(text for _, text in own) + b"]")
            names = dict.fromkeys(chain(FIELDS[kind], *lines))
            columns = {name: [line.get(name) for line in lines] for name in names if name != "kind"}
            # without lines no column is one of numbers, which text could not be joined with
            dtype = None if lines else object
            self._frames[kind] = pd.DataFrame({"record": [key for key, _ in own], **columns}, dtype=dtype)
        found = self._frames[kind]
        return found[found["record"].isin(self.runs.index[self.runs["task"] == task])] if task else found

    @cached_property
    def _texts(self) -> dict[str, list[tuple[str, bytes]]]:
        """By kind every line with its record; parsed once its kind is asked for: half of the time of reading."""
        found = defaultdict(list)
        for key, record in self.records.items():
            if record.status != "unfinished":
                for text in record.data[record.data.find(b"\n") + 1 :].splitlines():
                    # the kind stands in front: {"kind": "block", ...
                    found[text[10 : text.index(b'"', 10)].decode()].append((key, text))
        return found


def frames(
    records: Iterable[Record], membership: pd.DataFrame | None = None, withdrawn: Iterable[Json] = ()
) -> Frames:
    """Tidy frames of `records`; without a membership each record serves the experiment that its header names. By which
    rules some are `withdrawn` is in results/withdrawn.yaml.

    Raises ValueError with one line if there is no sound record.
    """
    sound, rows, left_out = dict[str, Record](), dict[str, Json](), dict[str, str]()
    for record in records:
        key, name = memberships.hash_of(record.path), "/".join(record.path.parts[-2:])
        try:
            key = key_of(record)
            row = {"name": name, **_run(record), **_withdrawn(record.run, withdrawn)}
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            left_out[name] = "its header is that of no record"
            continue
        if key in sound:
            left_out[name] = f"a second record of the name {key}"
        else:
            sound[key], rows[key] = record, row
    if not sound:
        said = "".join(f"; left out: {name}, {reason}" for name, reason in left_out.items())
        raise ValueError(f"no records found: run `make reproduce` first, or pass another folder{said}")
    runs = pd.DataFrame(list(rows.values()), index=pd.Index(rows, dtype=object, name="record"), dtype=object)
    # a machine's short name that stands for several processors tells them apart
    alone = runs.groupby("folder")["cpu"].transform("nunique") <= 1
    runs["folder"] = runs["folder"].where(alone, runs["folder"] + "/" + runs["cpu"].astype(str))
    keys = pd.DataFrame({"hash": [key.partition(".")[0] for key in sound], "key": list(sound)})
    named = memberships.of_headers([]) if membership is None else membership
    named = named.merge(keys, left_on="record", right_on="hash").assign(record=lambda own: own["key"])
    unlisted = sorted(set(sound) - set(named["record"]))
    own_rows = memberships.of_headers(sound[key] for key in unlisted).assign(record=unlisted)
    listed = pd.concat([named[memberships.COLUMNS], own_rows])
    listed = listed.sort_values(memberships.COLUMNS).drop(columns=["profile", "task"])
    members = listed.join(runs, on="record", how="inner").reset_index(drop=True)
    return Frames(sound, runs, _without_replaced(members), [] if membership is None else unlisted, left_out)


def key_of(record: Record) -> str:
    """What a record is called: the hash that its file bears, and its card, if that is told (HASH.CARD)."""
    own, key = card(record.run), memberships.hash_of(record.path)
    return f"{key}.{own}" if own else key


def setting(config: Json, path: str) -> Any:
    """One setting of a configuration by its dotted name; None if it has none."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def method_settings(method: Json | None) -> Json:
    """The settings of a method without those that older records lack and that are as they were before."""
    return {name: own for name, own in (method or {}).items() if name not in LATER or own != LATER[name]}


def host_id(header: Json) -> str:
    """Which host a record is of: its card. An older record, and one without a card, tells the kind of machine and the
    commit alone, and those of one commit on one kind count as of one host: each was measured in one sitting.
    """
    machine = header["machine"]
    parts = [machine.get(name) for name in ("cpu", "cores", "memory_gib", "os", "driver")]
    return machine.get("gpu_id") or " ".join(map(str, [*parts, header.get("commit")]))


def _withdrawn(header: Json, withdrawn: Iterable[Json]) -> Json:
    """Why a record is withdrawn, by the first rule that holds of it, and the tasks by which it is."""
    for rule in withdrawn:
        found = {path: setting(header, path) for path in rule["where"]}
        every = {path: own if isinstance(own, list) else [own] for path, own in found.items()}
        if all(any(one in rule["where"][path] for one in own) for path, own in every.items()):
            return {"withdrawn": rule["why"], "wrong": rule["tasks"]}
    return {"withdrawn": "", "wrong": []}


def _without_replaced(members: pd.DataFrame) -> pd.DataFrame:
    """Without withdrawn records whose experiment has others of the same families and level on the same machine."""
    own = members[members["task"].isin(["train", "evaluate"])]
    families = own["config"].map(lambda config: str(setting(config, "data.families")))
    sound = own["withdrawn"].eq("").groupby([own["experiment"], own["folder"], families, own["level"]])
    return members.drop(own[sound.transform("any") & own["withdrawn"].ne("")].index)


def _run(record: Record) -> Json:
    """One row of `runs`, but for its name."""
    run, config = record.run, record.run["config"]
    machine, model, versions = run["machine"], config["model"], run.get("versions") or {}
    targets, ranks = (setting(config, path) or [] for path in ("experts.targets", "layer.ranks"))
    settings = {name: setting(config, path) for name, path in PATHS.items()}
    return {
        "status": record.status,
        **{name: run.get(name) for name in ("task", "profile", "commit", "dirty")},
        **{name: run.get(name) or 0 for name in ("seed", "replicate")},
        "arm_versions": {arm: int(version) for arm, version in (run.get("arm_versions") or {}).items()},
        "machine": machine.get("gpu") or "CPU",
        "folder": str(machine.get("name")),
        "host_id": host_id(run),
        "host": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB",
        **{name: machine.get(name) for name in ("cpu", "driver")},
        **{name: versions.get(name) for name in ("torch", "python")},
        "model": Path(model.get("path") or str(model.get("name"))).name,
        "targets": ", ".join(str(name).removesuffix("_proj") for name in targets),
        "ranks": ", ".join(map(str, ranks)),
        "data": Path(setting(config, "data.path") or setting(config, "data.name") or "").name or None,
        **{name: BEFORE.get(name) if value is None else value for name, value in settings.items()},
        "config": config,
    }
