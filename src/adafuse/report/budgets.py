"""Adapters that stand in the studies of both budgets: where a method's own sizes are those of the equal budget, it is
trained once, and its record names the budget under which that happened first.

In: train and evaluate records. Out: the same, with such a record once for each budget. Next: trained.py.
"""

from __future__ import annotations

import dataclasses
import json

from adafuse.identity import without_unused
from adafuse.records import Record
from adafuse.report.accuracy import BUDGETS
from adafuse.report.cells import BACKBONE, Cell, base_key, method_name
from adafuse.report.variants import budget


def in_both_budgets(records: list[Record]) -> list[Record]:
    """Add a record to the study of the other budget if a method of just these sizes belongs there and is missing."""
    own = [r for r in records if r.run.get("task") in ("train", "evaluate") and method_name(r) != BACKBONE]
    # what would be of one study, by budget: the sizes that its records know of every method, and what was run
    sizes: dict[tuple[str, str], dict[str, str]] = {}
    there = set()
    for record in own:
        place = _rest(record), budget(record)
        methods = record.run["config"].get("methods", {})
        sizes.setdefault(place, {}).update({name: _text(method) for name, method in methods.items()})
        there.add((*place, method_name(record), record.run.get("seed", 0)))
    added = []
    for record in own:
        name, rest = method_name(record), _rest(record)
        for other in BUDGETS:
            known = sizes.get((rest, other), {}).get(name)
            missing = (rest, other, name, record.run.get("seed", 0)) not in there
            if missing and known == _text(record.run["config"]["method"]):
                config = record.run["config"] | {"budget": other}
                added.append(dataclasses.replace(record, run=record.run | {"config": config}))
    return [*records, *added]


def _rest(record: Record) -> str:
    same = json.loads(base_key(Cell((record,))))
    return json.dumps({k: v for k, v in same.items() if k != "budget"} | {"task": record.run["task"]})


def _text(method: object) -> str:
    return json.dumps(without_unused(method), sort_keys=True)
