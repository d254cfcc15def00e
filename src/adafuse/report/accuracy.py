"""Accuracy: which evaluations belong together, and how much better one method is than another on the same items.

In: evaluate records. Out: `Study` objects (one backbone, one data set, one task suite, one budget; all methods and
seeds) and paired differences. Next: accuracy_table.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adafuse.records import Record
from adafuse.report.cells import BACKBONE, Cell, cells, method_name, model_name, title
from adafuse.report.older import BEFORE, entry
from adafuse.report.pooling import is_domain
from adafuse.report.variants import budget, variants
from adafuse.report.verdicts import MIN_SEEDS
from adafuse.stats import Difference, paired_difference

# from here on seeds chose settings (experiment=difficulty, learning_rate): no study counts them
PILOT_SEED = 100
BUDGETS = {"published": "published sizes", "equal": "equal parameters"}
Seeds = dict[int, list[Record]]
Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """One cell of accuracy records, by variant of a method and by seed; one record for each domain if there
    are several.
    """

    cell: Cell
    variants: dict[str, Seeds]
    tasks: list[str]
    # another backbone, by name, that has the very same weights
    same_as: str | None = None

    @property
    def table(self) -> str:
        """The table of the paper that this study answers."""
        if not is_domain(self.cell.records[0]):
            return "table2"
        return "table4" if "mistral" in json.dumps(self.cell.config.get("model")).lower() else "table3"


def studies(records: list[Record], elsewhere: Collection[Path] = ()) -> list[Study]:
    """The accuracy studies among `records`, without those that a table of their own tells."""
    found: list[Study] = []
    counted = [record for record in as_trained(records) if not is_pilot(record)]
    for cell in cells(counted, "evaluate"):
        left = Cell(tuple(record for record in cell.records if record.path not in elsewhere))
        if len(left.records) == len(cell.records) or trained(left.records):
            found.append(_study(left, found))
    return found


def as_trained(records: Iterable[Record]) -> list[Record]:
    """The evaluate records of the unmerged adapters in the precision in which they were trained."""
    own = [record for record in records if record.run.get("task") == "evaluate"]
    names = ("evaluate_strategy", "evaluate_dtype")
    return [r for r in own if all(entry(r.run["config"], name) == BEFORE[name] for name in names)]


def is_pilot(record: Record) -> bool:
    """True for a seed on which settings were chosen beforehand."""
    return int(record.run.get("seed", 0)) >= PILOT_SEED


def trained(records: Iterable[Record]) -> list[Record]:
    """Those that are not of the plain backbone."""
    return [record for record in records if method_name(record) != BACKBONE]


def by_seed(records: Iterable[Record]) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = {}
    for record in records:
        found.setdefault(record.run.get("seed", 0), []).append(record)
    return found


def scores(records: Iterable[Record]) -> Scores:
    """For each task its first metric (the suite's own choice), with the items of that metric if they were
    kept.

    A task over the user's own files is named after their folder.
    """
    found: Scores = {}
    for record in records:
        if record.status == "unfinished":
            continue
        own = record.run["config"].get("data", {}).get("path")
        kept = {(line["suite_task"], line["metric"]): line["correct"] for line in record.of("items")}
        for line in record.of("metric"):
            task = Path(own).name if own and line["suite_task"].startswith("local") else line["suite_task"]
            found.setdefault(task, line | {"correct": kept.get((line["suite_task"], line["metric"]))})
    return found


def tasks_of(records: Iterable[Record]) -> list[str]:
    """Every task of these records, in the order of the suite."""
    return list(dict.fromkeys(task for record in records for task in scores([record])))


def averages(seeds: Seeds, tasks: list[str]) -> list[float]:
    """The accuracy averaged over `tasks`, of each seed that has them all."""
    found = [scores(records) for records in seeds.values()]
    whole = [one for one in found if tasks and all(_is_number(one, task) for task in tasks)]
    return [float(np.mean([one[task]["value"] for task in tasks])) for one in whole]


def average(seeds: Seeds, tasks: list[str]) -> float | None:
    """The mean of `averages`; None if no seed has all tasks."""
    values = averages(seeds, tasks)
    return float(np.mean(values)) if values else None


def difference(study: Study, left: str, right: str) -> Difference | None:
    """Accuracy of `left` minus that of `right`, on the seeds, tasks and items that both have; None if there
    are none.
    """
    return paired(study.variants.get(left, {}), study.variants.get(right, {}), study.tasks)


def extremes(study: Study, left: str, right: str) -> list[tuple[str, Difference]] | None:
    """The tasks on which `left` is furthest behind and ahead of `right`; None for fewer than two tasks."""
    known = by_task(study, left, right)
    if len(known) < 2:
        return None
    return [end(known.items(), key=lambda own: own[1].value) for end in (min, max)]


def without_one(study: Study, left: str, right: str) -> list[tuple[str, Difference]]:
    """For each task the difference of `left` and `right` over all others, from the lowest to the highest; empty for
    fewer than two tasks, or if one lacks a task.
    """
    if len(study.tasks) < 2 or len(by_task(study, left, right)) < len(study.tasks):
        return []
    sides = study.variants[left], study.variants[right]
    rest = {task: paired(*sides, [other for other in study.tasks if other != task]) for task in study.tasks}
    return sorted(((task, own) for task, own in rest.items() if own), key=lambda pair: pair[1].value)


def enough(found: Difference | None) -> Difference | None:
    """None for what stands on fewer seeds than decide."""
    return found if found and found.n_seeds >= MIN_SEEDS else None


def by_task(study: Study, left: str, right: str) -> dict[str, Difference]:
    """The difference of two methods on each task that both have."""
    sides = study.variants.get(left, {}), study.variants.get(right, {})
    found = {task: paired(*sides, [task]) for task in study.tasks}
    return {task: own for task, own in found.items() if own}


def paired(left: Seeds, right: Seeds, tasks: list[str]) -> Difference | None:
    """Accuracy of `left` minus that of `right`; a seed counts if both have the same items of all `tasks`, and stand
    on the same backbone as far as they name it.
    """
    pairs = []
    for seed in sorted(set(left) & set(right)):
        if len(backbones([*left[seed], *right[seed]])) > 1:
            continue
        one, two = scores(left[seed]), scores(right[seed])
        if tasks and all(same_items(one, two, task) for task in tasks):
            pairs.append([[found[task]["correct"] for task in tasks] for found in (one, two)])
    if not pairs:
        return None
    return paired_difference([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def backbones(records: Iterable[Record]) -> set[str]:
    """The checksums of the backbones that these records name."""
    return {line["sha256"] for record in records for line in record.of("backbone")}


def same_items(one: Scores, two: Scores, task: str) -> bool:
    """True if both kept the results of the same items: as many, under the same hash where they have one."""
    lines = [found.get(task, {}) for found in (one, two)]
    kept = [line.get("correct") or [] for line in lines]
    hashes = [line.get("task_hash") for line in lines]
    return bool(kept[0]) and len(kept[0]) == len(kept[1]) and hashes[0] == hashes[1]


def trainable(records: Iterable[Record]) -> int | None:
    """How many parameters were trained, if a record says so."""
    lines = [line for record in records for line in record.of("parameters")]
    return int(lines[0]["trainable"]) if lines else None


def heading(cell: Cell) -> str:
    """What a study is about: the cell's title, its data, and how the sizes of the methods were chosen."""
    data = entry(cell.config, "data")
    level = f", level {data['level']}" if data["level"] != 1 else ""
    name = Path(data["path"]).name if data.get("path") else data.get("name")
    return " · ".join([title(cell), f"data {name}{level}", budget_text(cell)])


def budget_text(cell: Cell) -> str:
    return BUDGETS.get(budget(cell.records[0]), budget(cell.records[0]))


def _study(cell: Cell, before: list[Study]) -> Study:
    found = {name: by_seed(group) for name, group in variants(list(cell.records)).items()}
    own = backbones(cell.records)
    others = [model_name(study.cell.config) for study in before if own & backbones(study.cell.records)]
    same_as = next((name for name in others if name != model_name(cell.config)), None)
    return Study(cell, found, tasks_of(cell.finished), same_as)


def _is_number(found: Scores, task: str) -> bool:
    return isinstance(found.get(task, {}).get("value"), (int, float))
