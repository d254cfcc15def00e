"""What lm-eval calls for a task's items; the YAML files beside this one name it.

In: the family (from the task's YAML) and the data folder (from the TaskManager's metadata). Out: lm-eval's splits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from adafuse.data.items import load_items


def choices(family: str, data_folder: str, **_: object) -> dict[str, Dataset]:
    """Items with choices, scored by log-likelihood."""
    return _splits(family, data_folder, with_choices=True)


def answers(family: str, data_folder: str, **_: object) -> dict[str, Dataset]:
    """Items without choices, whose answer is generated."""
    return _splits(family, data_folder, with_choices=False)


def before_the_first_error(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """For long answers: the share that stands before the first wrong letter, and whether there is none."""
    wanted, got = doc["answer"], results[0]
    same = [a == b for a, b in zip(wanted, got, strict=False)]
    right = same.index(False) if False in same else len(same)
    return {"prefix": right / len(wanted), "exact_match": float(got == wanted)}


def _splits(family: str, data_folder: str, with_choices: bool) -> dict[str, Dataset]:
    splits = {}
    for split in ("validation", "test"):
        items = [i for i in load_items(Path(data_folder), family, split) if bool(i.choices) == with_choices]
        rows = [{k: v for k, v in vars(item).items() if v is not None} for item in items]
        splits[split] = Dataset.from_list(rows)
    if not len(splits["test"]):
        kind = "with" if with_choices else "without"
        raise ValueError(
            f"{family} in {data_folder} has no test item {kind} choices: name the other task in suite.tasks"
        )
    return splits
