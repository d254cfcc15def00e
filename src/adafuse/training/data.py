"""The data on disk: what adapters are trained on and evaluated with, written once and checked whenever it is read.

In: a `Data` and a folder. Out: FAMILY.SPLIT.jsonl files beside manifest.json, items and token ids. The backbone's own
pre-training text also comes from here. Next: evaluation/harness.py reads the test items; trainer.py the training set.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from adafuse.config import Data
from adafuse.training import standard_library
from adafuse.training.families import Item, generate, lessons
from adafuse.training.splits import SPLITS

if TYPE_CHECKING:
    import torch

# Raise it with any change of an item or of the pre-training text: nothing trained before is then comparable.
DATA_VERSION = 1
# The name under which the user's own files (data.path) are trained on and evaluated.
LOCAL = "local"
# Where evaluation stops generating, so training must teach it.
END = "\n"
LESSONS_PER_CHUNK = 32
TEXT_CHARACTERS = 200


def recipe(data: Data, seed: int) -> dict[str, Any]:
    """What decides the content of a data folder; a plain dict to hash or compare."""
    counts = {split: getattr(data, f"{split}_items") for split in SPLITS}
    own = {} if data.path is None else {split: _sha256(_own_file(data, split)) for split in SPLITS}
    return {
        "text": text_version(),
        "families": list(data.families),
        "items": counts,
        "own": own,
        "seed": seed,
    }


def text_version() -> str:
    """What decides the generated text: this code, and the Python whose standard library is read."""
    return f"{DATA_VERSION} of Python {platform.python_version()}"


def write(data: Data, folder: Path, seed: int) -> Path:
    """Write all splits of all families into `folder`, or check the ones that are there; return the folder.

    The manifest is written last, so an interrupted call starts again. Raises ValueError if finished files have changed
    or belong to other settings.
    """
    wanted = recipe(data, seed)
    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        manifest = _manifest(folder)
        if manifest["recipe"] != wanted:
            raise ValueError(f"{folder} holds data of other settings: delete it and run again")
        for name in manifest["files"]:
            _verified(folder, name)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in SPLITS:
        for family in data.families:
            items = generate(family, split, wanted["items"][split], seed)
            files.update(_write_items(folder, family, split, items))
        if data.path is not None:
            files.update(_write_items(folder, LOCAL, split, _own_items(_own_file(data, split))))
    manifest = {"recipe": wanted, "files": files}
    _replace(manifest_path, json.dumps(manifest, indent=1).encode())
    return folder


def load_items(folder: Path, family: str, split: str) -> list[Item]:
    """Items of one family and split. Raises ValueError if they are missing or not what was written."""
    content = _verified(folder, f"{family}.{split}.jsonl")
    return [Item(**json.loads(line)) for line in content.splitlines()]


def training_dataset(
    data: Data, folder: Path, tokenizer: Any, max_length: int, split: str
) -> list[dict[str, list[int]]]:
    """Token ids of all items of a split: {input_ids, labels}, labels -100 on the prompt.

    With data.path these are the user's items, else those of data.families. What exceeds `max_length` is cut on
    the left.
    """
    families = [LOCAL] if data.path is not None else list(data.families)
    items = [item for family in families for item in load_items(folder, family, split)]
    return _tokenised(items, tokenizer, max_length)


def pretraining_tokens(tokenizer: Any, n_tokens: int, seed: int) -> torch.Tensor:
    """LongTensor [n_tokens] for the backbone: library text and lessons by turns, from training content only.

    The lessons teach the skills (copying, comparing) in other words than the families' exercises.
    """
    import torch

    chunks = _pretraining_chunks(seed)
    ids: list[int] = []
    while len(ids) < n_tokens:
        batch = tokenizer(list(islice(chunks, 64)), add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(token for chunk in batch for token in chunk)
    return torch.tensor(ids[:n_tokens], dtype=torch.long)


def _pretraining_chunks(seed: int) -> Any:
    text = standard_library.text("train")
    starts = list(range(0, len(text), TEXT_CHARACTERS))
    Random(f"pretraining/{seed}").shuffle(starts)
    teach = lessons(seed)
    for start in cycle(starts):
        yield text[start : start + TEXT_CHARACTERS] + END
        yield "".join(islice(teach, LESSONS_PER_CHUNK))


def _tokenised(items: list[Item], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    # as lm-eval does it: the answer's tokens are those that follow the prompt's own length
    prompts = tokenizer([item.prompt for item in items])["input_ids"]
    wholes = tokenizer([item.prompt + item.answer + ("" if item.choices else END) for item in items])[
        "input_ids"
    ]
    rows = []
    for prompt, ids in zip(prompts, wholes, strict=True):
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        rows.append({"input_ids": ids[-max_length:], "labels": labels[-max_length:]})
    return rows


def _own_file(data: Data, split: str) -> Path:
    path = Path(str(data.path)) / f"{split}.jsonl"
    if not path.is_file():
        raise ValueError(
            f"data.path: {path} is missing (rows: prompt, answer, and for choices also choices, label)"
        )
    return path


def _own_items(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            choices, label = row.get("choices"), row.get("label")
            answer = choices[label] if choices else row["answer"]
            items.append(Item(str(row["prompt"]), str(answer), choices, label))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as problem:
            raise ValueError(
                f"{path}, line {number}: {type(problem).__name__} {problem}; a row is an object with "
                "prompt and answer, or with prompt, choices and label"
            ) from None
    if not items:
        raise ValueError(f"{path} is empty: give it at least one row")
    return items


def _write_items(folder: Path, family: str, split: str, items: list[Item]) -> dict[str, dict[str, Any]]:
    name = f"{family}.{split}.jsonl"
    rows = [{key: value for key, value in asdict(item).items() if value is not None} for item in items]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    _replace(folder / name, content)
    return {name: {"sha256": hashlib.sha256(content).hexdigest(), "rows": len(rows)}}


def _replace(path: Path, content: bytes) -> None:
    # two processes may write the same folder: each puts whole files in place
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        return {key: manifest[key] for key in ("recipe", "files")}
    except FileNotFoundError:
        raise ValueError(f"no data in {folder}: write it first, with task=train") from None
    except (ValueError, KeyError, TypeError):
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
