"""Which lm-eval tasks a suite may name: ours from the YAML files in tasks/, and with `bundled` those of lm-eval.

In: a `Suite`, and the `Data` that its items come from. Out: nothing, or a ValueError, before anything heavy is
imported. Next: harness.py, which runs them.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from adafuse.config import Data, Suite
from adafuse.data.items import PREPARED
from adafuse.data.rows import task_of
from adafuse.shape import read_json

TASKS = Path(__file__).parent / "tasks"
LOCAL_TASKS = ("local_answers", "local_choices")
NAME = re.compile(r"^[\"']?(?:task|group)[\"']?:\s*[\"']?([\w.-]+)[\"']?\s*$", re.MULTILINE)


def own_tasks() -> list[str]:
    """Names of the tasks in this repository: one YAML file each, named after its task."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def check_suite(suite: Suite, data: Data | None = None) -> None:
    """Refuse a task that does not exist and, given `data`, one of ours without items. Raises ValueError."""
    ours = own_tasks()
    for name in suite.tasks:
        if name in ours:
            _check_items(name, data)
        elif not suite.bundled:
            raise ValueError(
                f"unknown task '{name}' in suite.tasks: choose from {ours}, or set suite.bundled=true"
            )
        elif name not in bundled_names():
            raise ValueError(
                f"unknown task '{name}' in suite.tasks: neither ours ({ours}) nor bundled with lm-eval"
            )


def check_sets(suite: Suite) -> None:
    """Refuse a bundled task whose data set is not in suite.path. Raises ValueError."""
    if suite.path is None:
        return
    there = prepared_sets(suite.path)
    for name in suite.tasks:
        if name not in there and name not in own_tasks():
            raise ValueError(
                f"task '{name}' in suite.tasks has no data in suite.path={suite.path}: choose from {sorted(there)}, "
                "or set suite.path=null for the hub's"
            )


def prepared_sets(folder: str) -> dict[str, Path]:
    """The folder of each task's data set in suite.path. Raises ValueError for one that was not prepared."""
    try:
        tasks = read_json(Path(folder) / PREPARED)["tasks"]
        places = {task: (Path(folder) / name).resolve() for task, name in tasks.items()}
        if not all(place.is_relative_to(Path(folder).resolve()) for place in places.values()):
            raise ValueError("it leads out of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(
            f"suite.path={folder} is not what scripts/prepare.py evaluation leaves: run that, or name its folder"
        ) from None
    return places


@cache
def bundled_names() -> set[str]:
    """Tasks and groups that lm-eval ships. Read as text: importing lm-eval and parsing takes 20 times as long."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ValueError("lm-eval is not installed: pip install 'lm-eval>=0.4.13,<0.5'")
    files = (Path(spec.origin).parent / "tasks").rglob("*.yaml")
    return {
        name for file in files for name in NAME.findall(file.read_text(encoding="utf-8", errors="replace"))
    }


def _check_items(name: str, data: Data | None) -> None:
    if data is None:
        return
    if name in LOCAL_TASKS and data.path is None:
        raise ValueError(
            f"task '{name}' in suite.tasks has no data: set data.path to a folder of your own items"
        )
    if name in LOCAL_TASKS and name != (fitting := task_of(str(data.path))):
        raise ValueError(f"task '{name}' in suite.tasks does not fit the rows of {data.path}: name {fitting}")
    if name not in LOCAL_TASKS and name not in data.families:
        raise ValueError(
            f"task '{name}' in suite.tasks has no data: add it to data.families={list(data.families)}"
        )
