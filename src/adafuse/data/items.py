"""The data on disk: what adapters are trained on and evaluated with, written once and checked whenever it is read.

In: a `Data` and a folder. Out: FAMILY.SPLIT.jsonl files beside manifest.json, items and token ids.
Next: evaluation/harness.py reads the test items; trainer.py the training set.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from adafuse.config import Data
from adafuse.data import families, real_tasks, standard_library
from adafuse.data.families import FAMILIES, LEVELS, MENDED, Item, before_mended, lessons
from adafuse.data.splits import SPLITS
from adafuse.data.tokens import Encoded, training_rows
from adafuse.files import put
from adafuse.shape import read_json

# Raise it with a change of the text that the samples below do not show: nothing trained before is then comparable.
DATA_VERSION = 2
# how many items of each level, and lessons of each family, show a change of their maker
SAMPLED = 3
# What scripts/prepare.py writes last into a folder: where its content is from, with hashes.
PREPARED = "manifest.json"
# The name under which the user's own files (data.path) are trained on and evaluated.
LOCAL = "local"


def recipe(data: Data, seed: int) -> dict[str, Any]:
    """What decides the content of a data folder; a plain dict to hash or compare."""
    counts = {split: getattr(data, f"{split}_items") for split in SPLITS}
    own = {}
    if data.path is not None:
        from adafuse.data import rows  # pydantic takes a third of a second

        own = rows.fingerprints(data.path)
    return {
        "text": items_version(tuple(sorted(data.families)), data.level),
        "families": list(data.families),
        "level": data.level,
        "items": counts,
        "own": own,
        "seed": seed,
    }


@cache
def items_version(names: tuple[str, ...], level: int = LEVELS[0]) -> str:
    """What the items of these families are made from, as a hash: a sample of each, and the library that cloze cuts.

    All levels are sampled. Where one was mended, the others keep the name that they had: it holds the wrong items.
    Raises ValueError for an unknown family.
    """
    samples: list[Any] = [DATA_VERSION]
    for name in names:
        if name == "cloze":
            samples.append(standard_library.fingerprint())
            continue
        mended = MENDED.get(name, ())
        for each in (LEVELS[0],) if name in real_tasks.NAMES else LEVELS:
            for split in SPLITS:
                wrong = each in mended and level not in mended
                items = (before_mended if wrong else _generate)(name, split, SAMPLED, 0, each)
                samples += [[item.prompt, item.answer, item.choices, item.label] for item in items]
    return _digest(samples)


@cache
def pretraining_version() -> str:
    """What the pre-training text is made from, as a hash: the library, and a sample of the lessons."""
    taught = [list(islice(lessons(split, 0), SAMPLED * len(FAMILIES))) for split in SPLITS]
    return _digest([DATA_VERSION, standard_library.fingerprint(), taught])


def is_mended(settings: dict[str, Any]) -> bool:
    """Whether text of this recipe once had wrong answers; pre-training text never had."""
    return any(settings["level"] in MENDED.get(name, ()) for name in settings.get("families", ()))


def former_text(settings: dict[str, Any], python: str | None = None, wrong: bool = False) -> str:
    """How text of these settings was named before: by the Python whose library it is.

    Today's name if this is another text than that, because DATA_VERSION was raised or (unless `wrong`) it was mended.
    """
    if DATA_VERSION != 2 or (is_mended(settings) and not wrong):
        return str(settings["text"])
    return f"2 of Python {python or platform.python_version()}"


def wrong_text(settings: dict[str, Any]) -> str:
    """The name of the text before it was mended, when no Python named it any more; today's if nothing was."""
    families = tuple(sorted(settings.get("families", ())))
    return items_version(families) if is_mended(settings) else str(settings["text"])


def _digest(samples: list[Any]) -> str:
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:12]


def write(data: Data, folder: Path, seed: int) -> Path:
    """Write all splits of all families into `folder`, or check the ones that are there; return the folder.

    The manifest is written last, so an interrupted call starts again. Raises ValueError if finished files have changed
    or belong to other settings.
    """
    wanted = recipe(data, seed)
    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        manifest = _manifest(folder)
        if manifest["recipe"] not in (wanted, wanted | {"text": former_text(wanted)}):
            raise ValueError(f"{folder} holds data of other settings: delete it and run again")
        for name in manifest["files"]:
            _verified(folder, name)
        return folder
    if data.path is not None:
        from adafuse.data import rows

        for notice in rows.notices(data.path):
            print(notice)
    files = {}
    for split in SPLITS:
        for family in data.families:
            items = _generate(family, split, wanted["items"][split], seed, data.level)
            files.update(_write_items(folder, family, split, items))
        if data.path is not None:
            files.update(_write_items(folder, LOCAL, split, rows.items(data.path, split)))
    manifest = {"recipe": wanted, "files": files}
    put(manifest_path, json.dumps(manifest, indent=1))
    return folder


def load_items(folder: Path, family: str, split: str) -> list[Item]:
    """Items of one family and split. Raises ValueError if they are missing or not what was written."""
    content = _verified(folder, f"{family}.{split}.jsonl")
    return [Item(**json.loads(line)) for line in content.splitlines()]


def families_of(data: Data) -> list[str]:
    """The names under which items are on disk: the user's own files (data.path), or the generated families."""
    return [LOCAL] if data.path is not None else list(data.families)


def title(data: Data, family: str, split: str) -> str:
    """What the items of a split are called in messages: the user's own by their file."""
    return f"{data.path}/{split}.jsonl" if data.path is not None else f"{family}, {split} items"


def dataset_of(data: Data, family: str, folder: Path, tokenizer: Any, max_length: int, split: str) -> Encoded:
    """One family's items of a split as they are learnt, at most `max_length` tokens each.

    Raises ValueError, one line, for an item that the tokenizer cannot cut into prompt and answer.
    """
    try:
        return training_rows(load_items(folder, family, split), tokenizer, max_length)
    except ValueError as problem:
        raise ValueError(f"{title(data, family, split)}: {problem}") from None


def _generate(name: str, split: str, count: int, seed: int, level: int) -> list[Item]:
    maker = real_tasks.generate if name in real_tasks.NAMES else families.generate
    return maker(name, split, count, seed, level)


def _write_items(folder: Path, family: str, split: str, items: list[Item]) -> dict[str, dict[str, Any]]:
    name = f"{family}.{split}.jsonl"
    rows = [{key: value for key, value in asdict(item).items() if value is not None} for item in items]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    put(folder / name, content)
    return {name: {"sha256": hashlib.sha256(content).hexdigest(), "rows": len(rows)}}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        if not all(
            name == Path(name).name and isinstance(told["sha256"], str)
            for name, told in manifest["files"].items()
        ):
            raise ValueError("it names no files of this folder")
        return {key: manifest[key] for key in ("recipe", "files")}
    except FileNotFoundError:
        raise ValueError(f"no data in {folder}: write it first, with task=train") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete {folder} and run again") from None


def _verified(folder: Path, name: str) -> bytes:
    expected = _manifest(folder)["files"].get(name)
    if expected is None:
        raise ValueError(f"no {name} in {folder}: name its family in data.families")
    path = folder / name
    if not path.is_file() or _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path} is not what was written: delete {folder} and run again")
    return path.read_bytes()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
