"""Records, their seals and what is among them: damaged ones are named and left out, never a traceback."""

from pathlib import Path

from adafuse import archive, records
from synthetic import hostile
from synthetic.records import write_one
from synthetic.runs import write_latency


def specimen(folder: Path) -> Path:
    write_one(folder / "evaluate/one.jsonl")
    path = write_latency(folder, rounds=2)
    path.with_name("two.jsonl.partial").write_bytes(path.read_bytes()[:-200])
    return folder


def read(folder: Path) -> None:
    archive.load([folder])
    for file in (folder / "evaluate/one.jsonl", folder / "latency/two.jsonl.partial"):
        records.is_done(file, "cell-hash")
    archive.verify(folder)


def seal(folder: Path) -> None:
    for file in folder.rglob("*.jsonl"):
        hostile.seal(file)


def test_records(room: Path) -> None:
    hostile.attack("records", specimen(room / "good"), read, room, seal)
