"""Published records: an archive that anybody made is unpacked below its own folder, or refused."""

from pathlib import Path

from adafuse import archive
from synthetic import hostile
from synthetic.records import write_one


def read(folder: Path) -> None:
    archive.load([folder])
    for file in sorted(folder.rglob("*.parquet")):
        archive.unpack(file, folder / "out")
    archive.verify(folder)


def test_archives(room: Path) -> None:
    for name in ("one", "two", "three"):
        write_one(room / f"records/latency/{name}.jsonl", cell_id=name)
    archive.pack([room / "records"], room / "good")
    hostile.attack("archives", room / "good", read, room)
