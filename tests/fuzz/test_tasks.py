"""What lm-eval's tasks are read from: data sets that were prepared (suite.path), and the items of our own tasks."""

import json
from pathlib import Path

from adafuse.config import Data, Suite
from adafuse.data import items
from adafuse.evaluation.suites import check_sets
from adafuse.evaluation.tasks import loader
from synthetic import hostile

DATA = Data("two", ["copy", "comparison"], 1, None, 4, 2, 3)

LOADERS = {"copy": loader.answers, "comparison": loader.choices}


def read(folder: Path) -> None:
    check_sets(Suite("mine", ["arc_easy"], bundled=True, path=str(folder / "sets")))
    items.write(DATA, folder / "items", 0)
    for family in DATA.families:
        LOADERS[family](family, str(folder / "items"))


def test_tasks(room: Path) -> None:
    (room / "good/sets/allenai").mkdir(parents=True)
    told = {"tasks": {"arc_easy": "allenai", "arc": "allenai"}, "files": {"allenai/x": "0" * 64}}
    (room / "good/sets" / items.PREPARED).write_text(json.dumps(told))
    items.write(DATA, room / "good/items", 0)
    hostile.attack("tasks", room / "good", read, room)
