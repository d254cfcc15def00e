"""Accuracy: the paper's Tables 2, 3 and 4 beside ours, each method against plain LoRA on the same items.

In: evaluate records and the paper's numbers. Out: `Study` objects (one backbone, one data set, one task
suite; all methods and seeds) and a `Sheet` each. Next: evidence.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, cells, first_error, is_domain, short_name, title
from adafuse.report.sheet import Columns, Row, Section, Sheet
from adafuse.report.text import GAP, points_text
from adafuse.stats import Difference, paired_difference

ORDER = ("base", "lora", "mola", "moral", "pesc", "mixlora", "adafuse_layerwise", "adafuse")
LORA = "lora"
ABOUT = (
    "Accuracy in per cent ± one standard error (over items for one seed, over seeds for more). The last column "
    "is the mean difference to plain LoRA, paired per item, with its 95 % interval. Our tasks are not the "
    "paper's: compare differences, not values."
)


@dataclass(frozen=True)
class Study:
    """One cell of accuracy records, by variant of a method and by seed; one record for each domain if there
    are several.
    """

    cell: Cell
    variants: dict[str, dict[int, list[Record]]]
    tasks: list[str]

    @property
    def table(self) -> str:
        """The table of the paper that this study answers."""
        if not is_domain(self.cell.records[0]):
            return "table2"
        return "table4" if "mistral" in json.dumps(self.cell.config.get("model")).lower() else "table3"


def studies(records: list[Record]) -> list[Study]:
    """The accuracy studies among `records`."""
    return [_study(cell) for cell in cells(records, "evaluate")]


def scores(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """For each task its first metric (the suite's own choice), with the items of that metric if they were
    kept.

    A task over the user's own files is named after their folder.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.status == "unfinished":
            continue
        own = record.run["config"].get("data", {}).get("path")
        kept = {(line["suite_task"], line["metric"]): line["correct"] for line in record.of("items")}
        for line in record.of("metric"):
            task = Path(own).name if own and line["suite_task"].startswith("local") else line["suite_task"]
            found.setdefault(task, line | {"correct": kept.get((line["suite_task"], line["metric"]))})
    return found


def difference(study: Study, left: str, right: str) -> Difference | None:
    """Accuracy of `left` minus that of `right`, on the seeds, tasks and items that both have; None if there
    are none.
    """
    a, b = study.variants.get(left, {}), study.variants.get(right, {})
    by_seed = []
    for seed in sorted(set(a) & set(b)):
        one, two = scores(a[seed]), scores(b[seed])
        pairs = [(_items(one, task), _items(two, task)) for task in study.tasks]
        if all(left and len(left) == len(right) for left, right in pairs):
            by_seed.append(pairs)
    if not by_seed:
        return None
    lefts, rights = ([[pair[side] for pair in pairs] for pairs in by_seed] for side in (0, 1))
    return paired_difference(lefts, rights)


def table(name: str, found: list[Study], paper: dict[str, Any]) -> Sheet:
    """Table 2 (general), 3 or 4 (domain, by backbone): ours first, then the paper's own tasks in a block of
    their own.
    """
    printed = paper[name]
    sections = [_section(study) for study in found if study.table == name]
    if not sections:
        reason = f"not run in this profile: experiment={printed['experiment']}"
        rows: list[Row] = [{"method": row["label"], "ours": reason, "records": []} for row in printed["rows"]]
        columns: Columns = {"method": lambda row: row["method"], "ours": lambda row: row["ours"]}
        sections = [Section("Ours", "", rows, columns)]
    return Sheet(name, f"Table {name[-1]}: {printed['title']}", ABOUT, [*sections, _paper_section(printed)])


def _items(found: dict[str, dict[str, Any]], task: str) -> list[float]:
    return list(found.get(task, {}).get("correct") or [])


def _study(cell: Cell) -> Study:
    by_setting: dict[tuple[str, str], dict[int, list[Record]]] = {}
    for record in cell.records:
        method = record.run["config"].get("method", {})
        key = (str(method.get("name")), json.dumps(method, sort_keys=True))
        by_setting.setdefault(key, {}).setdefault(record.run.get("seed", 0), []).append(record)
    variants = {_variant(key, list(by_setting)): by_setting[key] for key in sorted(by_setting, key=_rank)}
    tasks = list(dict.fromkeys(task for record in cell.finished for task in scores([record])))
    return Study(cell, variants, tasks)


def _rank(key: tuple[str, str]) -> tuple[int, str, str]:
    return (ORDER.index(key[0]) if key[0] in ORDER else len(ORDER), *key)


def _variant(key: tuple[str, str], keys: list[tuple[str, str]]) -> str:
    """The method's name, with the settings in which it differs from its namesakes."""
    name, own = key[0], json.loads(key[1])
    namesakes = [json.loads(text) for other, text in keys if other == name]
    differing = [field for field in own if any(other.get(field) != own[field] for other in namesakes)]
    return name if not differing else f"{name} ({', '.join(f'{field}={own[field]}' for field in differing)})"


def _section(study: Study) -> Section:
    columns: Columns = {"method": lambda row: row["method"]}
    for task in study.tasks:
        columns[task] = partial(_score_text, task=task)
    columns["average"] = partial(_score_text, task="average")
    columns["minus LoRA [95 %]"] = lambda row: GAP if row["method"] == LORA else points_text(row["to_lora"])
    columns["seeds"] = lambda row: str(row["seeds"])
    absent = [
        name for name in ORDER if not any(v == name or v.startswith(name + " ") for v in study.variants)
    ]
    names = sorted([*study.variants, *absent], key=lambda name: _rank((name.split(" ")[0], name)))
    rows = [_row(study, name) for name in names]
    known = {task: line for r in study.cell.finished for task, line in scores([r]).items()}
    parts = [f"{task} ({known[task]['metric']}, {known[task]['n']} items)" for task in study.tasks]
    note = [f"Tasks: {', '.join(parts)}."] if parts else []
    twin = difference(study, "adafuse", "adafuse_layerwise")
    if twin:
        note.append(
            "One gate for all layers minus a gate per layer, same experts (the control that the paper lacks): "
            f"{points_text(twin)} points, {twin.method}."
        )
    return Section(title(study.cell), caption(study.cell), rows, columns, note)


def _row(study: Study, variant: str) -> Row:
    seeds = study.variants.get(variant, {})
    every = [record for records in seeds.values() for record in records]
    finished = [record for record in every if record.status != "unfinished"]
    by_seed = [found for records in seeds.values() if (found := scores(records))]
    row: Row = {"method": variant, "seeds": len(by_seed), "reason": _reason(every, variant)}
    for task in study.tasks:
        lines = [found[task] for found in by_seed if task in found]
        row[task], row[f"{task}_se"] = _mean(
            [line["value"] for line in lines], [line["stderr"] for line in lines]
        )
    whole = [found for found in by_seed if all(task in found for task in study.tasks)]
    averages = [np.mean([found[task]["value"] for task in study.tasks]) for found in whole]
    errors = [_pooled(found[task]["stderr"] for task in study.tasks) for found in whole]
    row["average"], row["average_se"] = _mean(averages, errors)
    row["to_lora"] = difference(study, variant, LORA)
    row["_reason_at"] = (study.tasks or ["average"])[0] if not by_seed else None
    if all(row[task] is not None for task in study.tasks) and study.tasks:
        row["reason"] = None
    return row | {"records": [short_name(record) for record in finished]}


def _reason(records: list[Record], variant: str) -> str:
    if not records:
        return f"not run: method={variant}"
    if all(record.status == "unfinished" for record in records):
        return "unfinished record: run the same command again"
    return first_error(records) or "not in the record"


def _mean(values: list[Any], errors: list[Any]) -> tuple[float | None, float | None]:
    """Mean and standard error: over items for one seed, over seeds for more."""
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None, None
    if len(values) == 1:
        return float(values[0]), errors[0]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _pooled(errors: Iterable[float | None]) -> float | None:
    known = list(errors)
    if not known or any(error is None for error in known):
        return None
    return float(np.sqrt(sum(error**2 for error in known if error is not None)) / len(known))


def _score_text(row: Row, task: str) -> str:
    if row.get(task) is None:
        # A row without any number says why once.
        return str(row["reason"]) if row["_reason_at"] in (task, None) else GAP
    error = row[f"{task}_se"]
    return f"{100 * row[task]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _printed(row: Row, task: str) -> str:
    return f"{row[task]:.2f}"


def _paper_section(table: dict[str, Any]) -> Section:
    lora = next(row for row in table["rows"] if row["method"] == LORA)
    rows: list[Row] = []
    for row in [*table["rows"], *table.get("beside", [])]:
        mean = float(np.mean(row["accuracy"]))
        gain = mean - float(np.mean(lora["accuracy"])) if "method" in row else None
        values = dict(zip(table["tasks"], row["accuracy"], strict=True))
        rows.append({"method": row["label"]} | values | {"average": mean, "to_lora": gain})
    columns: Columns = {"method": lambda row: row["method"]}
    for task in table["tasks"]:
        columns[task] = partial(_printed, task=task)
    columns["average"] = partial(_printed, task="average")
    columns["minus LoRA"] = lambda row: f"{row['to_lora']:+.2f}" if row["to_lora"] else GAP
    labels = {row["method"]: row["label"] for row in table["rows"]}
    notes = [f"{labels[e['method']]}: {e['why']}." for e in table["exceptions"]]
    notes.append(f"{table['columns']['accuracy']['why']}.")
    return Section(f"The paper's numbers ({table['backbone']})", "", rows, columns, notes)
