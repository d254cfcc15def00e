"""Which rows trained adapters give: one for each method, and one for each setting in which it differs from its file.

In: evaluate or train records of one cell, and conf/method. Out: the records by name, methods in the order of every
table. Next: accuracy.py.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adafuse.compose import by_profile
from adafuse.identity import without_unused
from adafuse.records import Record
from adafuse.report.cells import method_name
from adafuse.report.older import entry

ORDER = ("base", "full", "lora", "mola", "moral", "pesc", "mixlora", "adafuse_layerwise", "adafuse")
METHOD_FILES = Path(__file__).resolve().parents[3] / "conf" / "method"
LORA, ADAFUSE, TWIN = "lora", "adafuse", "adafuse_layerwise"
# what AdaFuse's accuracy is held against, as every table and sentence calls it
OPPONENTS = {TWIN: "a gate per layer", LORA: "plain LoRA", "mola": "MoLA"}
# a budget sets them, from the geometry of the experts: they are no choice of their own
DERIVED = ("rank", "alpha", "static_rank", "static_alpha", "bottleneck_dim")


def variants(records: list[Record]) -> dict[str, list[Record]]:
    """The records by method; a method's further settings stand beside it, by the fields in which they differ."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(method_name(record), []).append(record)
    found: dict[str, list[Record]] = {}
    for name in sorted(groups, key=rank):
        own = {_text(setting(record)): setting(record) for record in groups[name]}
        files = {_text(setting(record)) for record in groups[name] if as_its_file(record)}
        for record in sorted(groups[name], key=lambda record: _text(setting(record))):
            found.setdefault(_label(name, setting(record), own, files), []).append(record)
    return {name: found[name] for name in sorted(found, key=rank)}


def setting(record: Record) -> dict[str, Any]:
    """The method as its record has it, without what a budget derives."""
    dropped = DERIVED if budget(record) == "equal" else ()
    method = without_unused(record.run["config"].get("method", {}))
    return {k: v for k, v in method.items() if k not in dropped}


def budget(record: Record) -> str:
    """How the sizes of the methods were chosen."""
    return str(entry(record.run["config"], "budget"))


def rank(name: str) -> tuple[int, str]:
    """Where a method stands in a table; its further settings follow it."""
    own = name.split(" ")[0]
    return (ORDER.index(own) if own in ORDER else len(ORDER)), name


def as_its_file(record: Record) -> bool:
    """True if nothing of the method was overridden."""
    return not overridden(record)


def overridden(record: Record) -> dict[str, Any]:
    """The settings of the method that are not those of its file, which a record does not keep."""
    file = method_file(method_name(record), str(record.run.get("profile", "cpu")))
    return {k: v for k, v in setting(record).items() if k in file and v != file[k]}


@cache
def method_file(name: str, profile: str = "cpu") -> dict[str, Any]:
    """What conf/method says of a method, without what follows from the experts; nothing for an unknown one."""
    path = METHOD_FILES / f"{name}.yaml"
    if not path.is_file():
        return {}
    OmegaConf.register_new_resolver("by_profile", by_profile, replace=True)
    # where the profile chooses, that is the file's word; what stands for something of the cell's is not
    file = OmegaConf.merge({"profile": profile}, OmegaConf.load(path))
    written = OmegaConf.to_container(file)
    assert isinstance(written, dict) and isinstance(file, DictConfig)
    chosen = {k for k, v in written.items() if str(v).startswith("${by_profile:")}
    plain = {str(k): v for k, v in written.items() if k != "profile" and not str(v).startswith("${")}
    return plain | {str(k): file[k] for k in chosen}


def _label(name: str, one: dict[str, Any], own: dict[str, dict[str, Any]], files: set[str]) -> str:
    """The name alone for the file's setting, or for the only one."""
    if len(own) == 1 or _text(one) in files:
        return name
    others = [own[text] for text in sorted(files)] or list(own.values())
    fields = sorted({field for other in (one, *others) for field in other})
    differing = [field for field in fields if any(other.get(field) != one.get(field) for other in others)]
    return f"{name} ({', '.join(f'{field}={one.get(field)}' for field in differing)})"


def _text(method: dict[str, Any]) -> str:
    return json.dumps(method, sort_keys=True)
