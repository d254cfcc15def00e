"""The paper's Tables 2, 3 and 4 beside ours, each method against plain LoRA on the same items.

In: studies, the training runs behind them and the paper's numbers. Out: a `Sheet` each. Next: on_par.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from adafuse.records import Record
from adafuse.report.accuracy import Seeds, Study, averages, backbones, difference, heading, scores, trainable
from adafuse.report.cells import caption, first_error, short_name
from adafuse.report.fits import Fits
from adafuse.report.held_out import loss_difference, loss_text, mean_loss
from adafuse.report.on_par import difference_text
from adafuse.report.sheet import Columns, Row, Section, Sheet
from adafuse.report.text import GAP, digits, points_text
from adafuse.report.variants import ADAFUSE, LORA, OPPONENTS, ORDER, TWIN, rank

ABOUT = (
    "Accuracy in per cent ± one standard error (over items for one seed, over seeds for more). Minus LoRA: the mean "
    "difference to plain LoRA, paired per item, with its 95 % interval. Our tasks are not the paper's: compare "
    "differences, not values."
)
ABOUT_LOSS = " Validation loss: nats per answer token on held-out items; by it learning rates were chosen."
CONTROL = ", same experts (the control that the paper lacks)"


def table(name: str, found: list[Study], paper: dict[str, Any], known: Fits) -> Sheet:
    """Table 2 (general), 3 or 4 (domain, by backbone): ours first, then the paper's own tasks in a block of
    their own; where training runs are not `known` there is no column of their losses.
    """
    printed = paper[name]
    sections = [_section(study, known) for study in found if study.table == name]
    if not sections:
        reason = f"not run in this profile: experiment={printed['experiment']}"
        rows: list[Row] = [{"method": row["label"], "ours": reason, "records": []} for row in printed["rows"]]
        columns: Columns = {"method": lambda row: row["method"], "ours": lambda row: row["ours"]}
        sections = [Section("Ours", "", rows, columns)]
    about = ABOUT + (ABOUT_LOSS if known else "")
    return Sheet(name, f"Table {name[-1]}: {printed['title']}", about, [*sections, _paper_section(printed)])


def score_row(seeds: Seeds, tasks: list[str]) -> Row:
    """For each task, and for their average, the mean over seeds and its standard error."""
    by_seed = [found for records in seeds.values() if (found := scores(records))]
    row: Row = {"seeds": len(by_seed)}
    for task in tasks:
        lines = [found[task] for found in by_seed if task in found]
        row[task], row[f"{task}_se"] = _mean(
            [line["value"] for line in lines], [line["stderr"] for line in lines]
        )
    whole = [found for found in by_seed if all(task in found for task in tasks)]
    errors = [_pooled(found[task]["stderr"] for task in tasks) for found in whole]
    row["average"], row["average_se"] = _mean(averages(seeds, tasks), errors)
    return row


def score_text(row: Row, task: str) -> str:
    """71.2 ± 0.8, in per cent."""
    if row.get(task) is None:
        return GAP
    error = row[f"{task}_se"]
    return f"{100 * row[task]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _section(study: Study, known: Fits) -> Section:
    columns: Columns = {"method": lambda row: row["method"]}
    columns["trainable (M)"] = lambda row: GAP if row["trainable"] is None else digits(row["trainable"] / 1e6)
    for task in [*study.tasks, "average"]:
        columns[task] = partial(_score_or_reason, task=task)
    columns["minus LoRA [95 %]"] = lambda row: GAP if row["method"] == LORA else points_text(row["to_lora"])
    if known:
        columns["validation loss"] = lambda row: digits(row["validation_loss"])
    columns["seeds"] = lambda row: str(row["seeds"])
    absent = [name for name in ORDER if not any(v.split(" ")[0] == name for v in study.variants)]
    rows = [_row(study, name, known) for name in sorted([*study.variants, *absent], key=rank)]
    return Section(heading(study.cell), caption(study.cell), rows, columns, _notes(study, known))


def tasks_note(records: Iterable[Record], tasks: list[str]) -> list[str]:
    """How each task is scored, and on how many items of a seed; nothing without tasks."""
    known = {task: line for record in records for task, line in scores([record]).items()}
    parts = [f"{task} ({known[task]['metric']}, {known[task]['n']} items)" for task in tasks]
    return [f"Tasks: {', '.join(parts)}."] if parts else []


def _notes(study: Study, known: Fits) -> list[str]:
    notes = tasks_note(study.cell.finished, study.tasks)
    if study.same_as:
        notes.append(f"The weights are those of backbone {study.same_as}: this is no second backbone.")
    several = backbones(study.cell.records)
    if len(several) > 1:
        notes.append(
            f"These records stand on {len(several)} backbones, pre-trained by one recipe but not the same: methods "
            "are compared only where they share one."
        )
    for other, name in OPPONENTS.items():
        found, said = (
            difference(study, ADAFUSE, other),
            f"AdaFuse minus {name}{CONTROL if other == TWIN else ''}",
        )
        if found:
            lost = loss_difference(study.variants[ADAFUSE], study.variants[other], known)
            loss = f" Validation loss: {loss_text(lost)} nats ({lost.method})." if lost else ""
            notes.append(f"{said}: {difference_text(found)}.{loss}")
    return notes


def _row(study: Study, variant: str, known: Fits) -> Row:
    seeds = study.variants.get(variant, {})
    every = [record for records in seeds.values() for record in records]
    finished = [record for record in every if record.status != "unfinished"]
    row: Row = {"method": variant, "trainable": trainable(finished)}
    row |= score_row(seeds, study.tasks)
    row |= {"reason": _reason(every, variant), "to_lora": difference(study, variant, LORA)}
    row["validation_loss"] = mean_loss(seeds, known)
    row["_reason_at"] = (study.tasks or ["average"])[0] if not row["seeds"] else None
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


def _score_or_reason(row: Row, task: str) -> str:
    # A row without any number says why once.
    if row.get(task) is None and row["_reason_at"] in (task, None):
        return str(row["reason"])
    return score_text(row, task)


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
