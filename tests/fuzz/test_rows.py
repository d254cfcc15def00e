"""The user's own rows (data.path), and the files that are made of them."""

import json
from pathlib import Path

from adafuse.data import rows
from synthetic import hostile

ANSWERED = [{"prompt": f"{n} and {n}?", "answer": str(n + n)} for n in range(6)]
CHOSEN = [{"prompt": f"{n} or {n + 1}?", "choices": [str(n), str(n + 1)], "label": n % 2} for n in range(6)]


def write(folder: Path, found: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    for place, split in enumerate(("train", "validation", "test")):
        own = found[2 * place : 2 * place + 2]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in own))


def read(folder: Path) -> None:
    for kind in ("answered", "chosen"):
        path = str(folder / kind)
        rows.task_of(path)
        rows.fingerprints(path)
        list(rows.notices(path))
        for split in ("train", "validation", "test"):
            rows.items(path, split)


def test_rows(room: Path) -> None:
    write(room / "good/answered", ANSWERED)
    write(room / "good/chosen", CHOSEN)
    hostile.attack("rows", room / "good", read, room)


def test_prompts(room: Path) -> None:
    (room / "good").mkdir()
    (room / "good/prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "of": 1}\n')
    hostile.attack("prompts", room / "good", lambda folder: rows.prompts(str(folder / "prompts.jsonl")), room)
