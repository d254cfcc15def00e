"""Many records at once: read from folders and archives alike, or packed into one Parquet file a machine and kind.

In: folders of *.jsonl, single records, archives. Out: records, and a line on each file that is none; or the archives
`<folder>/<machine>/<task>.parquet` with a row a record: its file name, the SHA-256 of its bytes, the bytes. To the
name of what was measured on a GPU its card is added (CELL-HASH.CARD.jsonl): each host has replicates of its own. Half
of the bytes are headers that hardly differ, so all rows are compressed together: 87 MB become 5.4. Next: report/.

    python -m adafuse.archive pack results/runs/records --out results/reference
    python -m adafuse.archive unpack results/reference --out FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from adafuse import records
from adafuse.files import printable, put, read_bytes
from adafuse.records import Record

COLUMNS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("content", pa.binary(), nullable=False),
    ]
)
# The best there is: a tenth smaller than zstd for records of one kind, and packed once.
BROTLI_LEVEL = 11
# A page is compressed by itself, so a whole archive is one page.
PAGE_BYTES = 2**26
SUFFIXES = (".jsonl", ".jsonl.partial", ".parquet")
# as many as file systems take
NAME_CHARACTERS = 255
# where a finished record's own checksum is
SEALED = slice(-67, -3)
# what may be a part of a path: a header is not trusted with more
PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass
class Loaded:
    """What was read, and a line on each file that was not: which, and why."""

    records: list[Record]
    left_out: list[str]


@dataclass
class Packed:
    """One row of an archive: where the record belongs, its file name and its bytes."""

    archive: Path
    name: str
    sha256: str
    content: bytes

    @property
    def path(self) -> Path:
        """Where the record would be if its archive were a folder."""
        return self.archive.with_suffix("") / self.name

    def record(self) -> Record:
        """Raises ValueError with one line if these are not the bytes that were packed."""
        named = (
            Path(self.name).name == self.name == printable(self.name) and len(self.name) <= NAME_CHARACTERS
        )
        if hashlib.sha256(self.content).hexdigest() != self.sha256 or not named:
            told = printable(self.name)[:NAME_CHARACTERS]
            raise ValueError(f"record {told} is damaged in its archive: restore {self.archive}")
        return records.parse(self.path, self.content)


def load(paths: Iterable[Path | str]) -> Loaded:
    """Every record in these folders, archives and files, in path order; identical copies once.

    A finished file wins over the `.partial` beside it. What is no record is named and left out. Raises ValueError with
    one line for a path that is not there.
    """
    found: dict[object, Record] = {}
    left_out: list[str] = []
    for path in _files(
        paths, lambda error: left_out.append(f"{error.filename} cannot be read: {error.strerror}")
    ):
        try:
            for record in _read(path, left_out):
                finished = record.status != "unfinished"
                found.setdefault(record.data[SEALED] if finished else record.path, record)
        except ValueError as error:
            left_out.append(str(error))
        except OSError as error:
            left_out.append(f"record {path} cannot be read: {error.strerror}")
    return Loaded(list(found.values()), left_out)


def rows(archive: Path) -> list[Packed]:
    """What an archive holds, in the order of names. Raises ValueError with one line if it is damaged, or is none."""
    content = read_bytes(archive)
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(COLUMNS.names).cast(COLUMNS)
        found = table.to_pylist()
    except (pa.ArrowException, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{archive} is damaged, or no archive of records: {reason}; restore it") from None
    return [Packed(archive, **row) for row in found]


def pack(sources: Iterable[Path | str], out: Path) -> list[Path]:
    """Add finished records to the archives below `out`; the archives that changed.

    The same records give the same bytes. Raises ValueError with one line, and writes nothing, for a record that is
    damaged, unfinished or from changed sources, and for two different ones of one name.
    """
    kept: dict[Path, dict[str, bytes]] = {}
    for path in _files(sources):
        for record in _read(path, None):
            records.check_lines(record)
            archive = _archive_of(record, out)
            if archive not in kept:
                kept[archive] = (
                    {row.name: row.record().data for row in rows(archive)} if archive.exists() else {}
                )
            name = _name(record)
            if kept[archive].setdefault(name, record.data) != record.data:
                raise ValueError(f"two different records are called {name} in {archive}: publish one of them")
    return [archive for archive, contents in sorted(kept.items()) if _write(archive, contents)]


def unpack(source: Path, folder: Path) -> int:
    """Write every record of an archive, or of all archives in a folder, byte for byte; how many.

    An archive becomes a folder of its name, and what lies between it and `source` stays: of `reference` comes
    `folder/cpu/latency/NAME.jsonl`, of `reference/cpu` comes `folder/latency/NAME.jsonl`, as runs have them. Raises
    ValueError if another file has a record's name.
    """
    count = 0
    for archive in _files([source]):
        if archive.suffix == ".parquet":
            root = source if source.is_dir() else source.parent
            target = folder / archive.relative_to(root).with_suffix("")
            for row in rows(archive):
                _place(target / row.name, row.record().data)
                count += 1
    return count


def verify(source: Path) -> int:
    """Look at every byte, seal, line and header of all archives in a folder; how many records are right.

    Raises ValueError with one line for the first that is not.
    """
    count = 0
    for archive in _files([source]):
        for record in _read(archive, None):
            records.check_lines(record)
            if archive.suffix == ".parquet" and _archive_of(record, archive.parents[1]) != archive:
                raise ValueError(f"record {record.path} is of another machine or task than its archive")
            count += 1
    return count


def _raise(error: OSError) -> NoReturn:
    raise error


def _files(paths: Iterable[Path | str], unread: Callable[[OSError], None] = _raise) -> Iterator[Path]:
    """Every file that may hold records; `unread` is told of folders that may not be looked into."""
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no such folder: {path}; pass a folder that holds records")
        below = (Path(at, name) for at, *names in os.walk(path, onerror=unread) for name in chain(*names))
        for file in sorted(below) if path.is_dir() else [path]:
            final = file.with_suffix("") if file.suffix == ".partial" else file
            # A cell that runs again keeps its old file until the new one is complete.
            if file == path or (file.name.endswith(SUFFIXES) and (final == file or not final.exists())):
                yield file


def _read(path: Path, left_out: list[str] | None) -> Iterator[Record]:
    """The records in a file; the rows of an archive that are none go to `left_out`, or are raised if that is None."""
    if path.suffix == ".parquet":
        for row in rows(path):
            try:
                yield row.record()
            except ValueError as error:
                if left_out is None:
                    raise
                left_out.append(str(error))
        return
    record = records.read(path)
    if not record.run:
        raise ValueError(f"record {path} has no header: delete it and run again")
    yield record


def _archive_of(record: Record, out: Path) -> Path:
    """Where a record is published. Raises ValueError with one line for one that must not be."""
    run, machine = record.run, record.run["machine"].get("name")
    if record.status == "unfinished":
        raise ValueError(f"record {record.path} is unfinished: run it to its end, or delete it")
    if run.get("dirty") is not False:
        raise ValueError(
            f"record {record.path} was made from sources that are no commit: commit them, measure again"
        )
    if not PLAIN.fullmatch(str(machine)) or not PLAIN.fullmatch(run["task"]):
        raise ValueError(f"record {record.path} names no machine and task that a folder can be called")
    return out / str(machine) / f"{run['task']}.parquet"


def _name(record: Record) -> str:
    name, card = record.path.name, records.card(record.run)
    own = f"{name.removesuffix('.jsonl').removesuffix(f'.{card}')}.{card}.jsonl"
    return own if card else name


def _write(archive: Path, contents: dict[str, bytes]) -> bool:
    """Put the archive in place, whole; False if it holds these very records already."""
    if archive.exists() and {row.name: row.content for row in rows(archive)} == contents:
        return False
    names = sorted(contents)
    data = [contents[name] for name in names]
    digests = [hashlib.sha256(content).hexdigest() for content in data]
    table = pa.table([names, digests, data], schema=COLUMNS)
    packed = pa.BufferOutputStream()
    layout = {"data_page_size": PAGE_BYTES, "row_group_size": len(names), "use_dictionary": False}
    compression = {"compression": "brotli", "compression_level": BROTLI_LEVEL}
    pq.write_table(table, packed, **compression, **layout, write_statistics=False)
    put(archive, packed.getvalue().to_pybytes())
    return True


def _place(path: Path, data: bytes) -> None:
    if path.exists():
        if read_bytes(path) != data:
            raise ValueError(f"{path} is there and differs from the packed one: move it away first")
        return
    put(path, data)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adafuse.archive", description="Published records.")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what in (
        ("pack", "add finished records to archives below --out"),
        ("unpack", "write the records of archives below --out, byte for byte"),
        ("list", "name the records of archives"),
        ("verify", "check every record of archives"),
    ):
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("sources", nargs="+", type=Path, help="folders or files")
        if name in ("pack", "unpack"):
            action.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        _act(options.action, options.sources, getattr(options, "out", Path()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _act(action: str, sources: list[Path], out: Path) -> None:
    if action == "pack":
        print("\n".join(f"packed: {archive}" for archive in pack(sources, out)) or "nothing new")
    elif action == "unpack":
        print(f"unpacked {sum(unpack(source, out) for source in sources)} records to {out}")
    elif action == "verify":
        print(f"{sum(map(verify, sources))} records: every byte, seal and line is right")
    else:
        for record in load(sources).records:
            print(record.path)


if __name__ == "__main__":
    sys.exit(main())
