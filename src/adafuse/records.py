"""Records: the one file that each replicate leaves, and the only thing that the report reads.

In: a path, the header fields (stages.py) and one call per line. Out: JSON lines, flushed line by line, sealed by an
`end` line with a checksum; or, read back, a `Record`. While a cell runs, its lines go to `<path>.partial` under an
exclusive lock; only a finished file bears the final name. Next: locking.py; archive.py, which reads many.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from adafuse.files import disk_error, read_bytes
from adafuse.locking import lock, unlock
from adafuse.paths import without_paths

SCHEMA = 1
# The fields that a line of each kind must have; a writer may add more.
FIELDS: dict[str, tuple[str, ...]] = {
    "run": ("schema", "task", "cell_id", "config_hash", "config", "machine"),
    "calibration": ("read_gbps", "copy_gbps"),
    "check": ("arm", "check", "value", "bound", "passed", "detail"),
    # a block that must not count, known only when all were measured
    "flag": ("arm", "round", "reason"),
    "block": ("arm", "round", "position", "tokens", "block_ms", "excluded", "state"),
    "cost": ("arm", "params", "macs", "bytes_per_token", "floor_ms"),
    "memory": ("arm", "weights_gib", "peak_gib", "note"),
    # of one token: launches, graph nodes, and milliseconds by what they are for
    "trace": ("arm", "tokens", "launches", "graph_nodes", "parts_ms", "gap_ms"),
    # [start us, length us, part] of every launch of that token, in order
    "spans": ("arm", "spans"),
    # of a fit: how many rows of a family were cut into how many tokens, and how many of those are learnt
    "tokens": ("split", "family", "rows", "tokens", "label_tokens"),
    "loss": ("step", "loss", "balance_loss", "learning_rate"),
    "metric": ("suite_task", "metric", "value", "stderr", "n"),
    "items": ("suite_task", "metric", "correct"),
    "layer": ("sequence_length", "rank", "phase", "part", "ms"),
    "kernel": ("kernel", "shape", "error", "bound", "ms", "naive_ms", "bytes", "floor_ms"),
    # of an adapter that is trained: its ratio to PEFT's LoRA; FLOP by the formula that the line holds
    "fit_speed": ("arm", "parameters", "tokens_per_s", "flops_per_token", "ratio", "peak_gib"),
    "drift": ("strategy", "switches", "weight_error", "delta_error", "logit_error"),
    # of a fit: one router's choices over held-out items of one family; of a timed arm: what its tokens touched
    "routing": (),
    # while a timed method decoded: how often each router chose other experts, and for how many tokens a choice stood
    "selections": ("method", "routers", "changed_share", "lasts_tokens"),
    # how much two routers' first choices tell of each other, 0 to 1, for every pair
    "agreement": ("routers", "information"),
    "parameters": ("trainable",),
    "artifact": ("path", "sha256"),
    # the one that a fit or an evaluation stood on, where it was pre-trained here: a GPU never makes the same twice
    "backbone": ("sha256",),
    # what the weights of model.path are stored in, whatever the cell computes in
    "checkpoint": ("path", "stored_in"),
    "error": ("where", "message", "traceback"),
    "end": ("status", "seconds", "peak_rss_gib", "sha256"),
}
# Tasks that say what a machine does: on another card the same cell is another record.
OF_A_CARD = ("latency", "memory", "trace", "layer", "kernel", "drift", "fit_speed")
# The last field of a file; every byte before it is under the checksum.
SEAL = b', "sha256": "'


@dataclass
class Record:
    """A record read back: its header, whether the replicate finished, and its bytes.

    Lines are parsed when they are asked for: all of 2,805 records take seconds, what a table needs of them does not.
    """

    path: Path
    run: dict[str, Any]
    status: Literal["ok", "error", "unfinished"]
    data: bytes = field(repr=False)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines, in the order in which they were written."""
        return [json.loads(line) for line in self.data.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in the order in which they were written."""
        start, data = f'\n{{"kind": "{kind}"'.encode(), b"\n" + self.data
        found, at = [], data.find(start)
        while at >= 0:
            end = data.find(b"\n", at + 1)
            found.append(json.loads(data[at:end] if end >= 0 else data[at:]))
            at = data.find(start, at + 1)
        return found


@contextmanager
def open_record(path: Path, run_fields: dict[str, Any]) -> Iterator[Recorder]:
    """Write one record: header first, `end` last, the final name only when all is on the disk.

    An exception that escapes becomes an error line and is raised again; an interrupt leaves the file unfinished.
    Raises ValueError if another process writes this cell, OSError if the disk does not take a line.
    """
    path = Path(path)
    descriptor = lock(partial_path(path))
    try:
        record = Recorder(descriptor, path)
        record.write("run", **{"schema": SCHEMA, **run_fields})
        try:
            yield record
        except Exception as exc:
            # A full disk may refuse the error line too; then the file stays unfinished.
            with suppress(OSError):
                record.fail(str(run_fields.get("task", "cell")), exc)
                record.seal()
            raise
        record.seal()
    finally:
        unlock(descriptor)


@dataclass
class Recorder:
    """Appends lines to a locked file. Made by `open_record`, which also seals it."""

    descriptor: int
    path: Path
    size: int = 0
    failed: bool = False
    digest: Any = field(default_factory=hashlib.sha256)
    started_s: float = field(default_factory=time.perf_counter)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line and flush it. Raises OSError when the disk refuses it."""
        missing = [name for name in FIELDS[kind] if name not in fields]
        assert not missing, f"record line '{kind}' lacks {missing}"
        self._append(_encode({"kind": kind, **fields}) + b"\n")

    def fail(self, where: str, exc: BaseException) -> None:
        """Append an error line without this machine's paths; the record will end with status error, and the cell may go
        on.
        """
        self.failed = True
        message = without_paths(" ".join(f"{type(exc).__name__}: {exc}".split()))
        lines = without_paths("".join(traceback.format_exception(exc)))
        self.write("error", where=where, message=message, traceback=lines)

    def seal(self) -> None:
        """Append the `end` line, bring everything to the disk and give the file its final name."""
        end = {
            "kind": "end",
            "status": "error" if self.failed else "ok",
            "seconds": round(time.perf_counter() - self.started_s, 3),
            "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        }
        self._append(_encode(end)[:-1])
        self._append(SEAL + self.digest.hexdigest().encode() + b'"}\n')
        partial = partial_path(self.path)
        try:
            os.fsync(self.descriptor)
            partial.replace(self.path)
        except OSError as exc:
            raise disk_error(partial, exc) from exc

    def _append(self, data: bytes) -> None:
        rest = data
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as exc:
            # Half a line would spoil the lines after it.
            os.ftruncate(self.descriptor, self.size)
            os.lseek(self.descriptor, self.size, os.SEEK_SET)
            raise disk_error(partial_path(self.path), exc) from exc
        self.size += len(data)
        self.digest.update(data)


def partial_path(path: Path) -> Path:
    """Where the lines of an unfinished record are."""
    return path.with_name(path.name + ".partial")


def is_done(path: Path, config_hash: str) -> bool:
    """True if this very cell finished without an error, so that it need not run again.

    Raises ValueError with one line when the file was truncated or edited.
    """
    if not Path(path).exists():
        return False
    record = read(Path(path))
    return record.status == "ok" and record.run.get("config_hash") == config_hash


def read(path: Path) -> Record:
    """Read one record and verify its checksum; a `.partial` file is read as far as it goes.

    Raises ValueError with one line when a finished record was truncated or edited, OSError when there is none.
    """
    path = Path(path)
    data = read_bytes(path)
    if path.suffix == ".partial":
        return _unfinished(path, data)
    record = parse(path, data)
    check_lines(record)
    return record


def parse(path: Path, data: bytes) -> Record:
    """The bytes of a finished record, its seal and header verified, its other lines not yet looked at.

    Raises ValueError with one line that names `path`.
    """
    if b'\n{"kind": "end", ' not in data or not data.endswith(b'"}\n'):
        raise _damaged(path, "is truncated: it has no end line, or is not a record")
    body, _, seal = data.rpartition(SEAL)
    if hashlib.sha256(body).hexdigest().encode() != seal[:-3]:
        raise _damaged(path, "was changed after it was written: its checksum does not match")
    run = _header(path, data)
    end = _line(path, data[data.rindex(b"\n", 0, -1) + 1 :])
    if end["kind"] != "end" or end["status"] not in ("ok", "error"):
        raise _damaged(path, "does not end with the line that says how it ended")
    return Record(path, run, end["status"], data)


def card(run: dict[str, Any]) -> str:
    """The card whose replicate a header is of (`machine.gpu_id`); "" where it does not matter, or was not told."""
    told = str(run["machine"].get("gpu_id") or "") if run["task"] in OF_A_CARD else ""
    return told if re.fullmatch("[0-9a-f]{12}", told) else ""


def check_lines(record: Record) -> None:
    """Look at every line. Raises ValueError with one line for the first that is none of a record."""
    for line in record.data.splitlines():
        _line(record.path, line)


def as_plain(value: Any) -> Any:
    """Dataclasses, enums (by name), paths and arrays as JSON's own types.

    A number that is not finite becomes null, which every JSON reader accepts.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: as_plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(inner) for inner in value]
    if isinstance(value, (Enum, Path)):
        return value.name if isinstance(value, Enum) else str(value)
    if hasattr(value, "tolist"):
        return as_plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unfinished(path: Path, data: bytes) -> Record:
    """The lines up to the first that a crash left broken; without a header there is nothing to say what it is."""
    whole, good = data[: data.rfind(b"\n") + 1], b""
    try:
        run = _header(path, whole)
    except ValueError:
        return Record(path, {}, "unfinished", b"")
    with suppress(ValueError):
        for line in whole.splitlines(keepends=True):
            _line(path, line)
            good += line
    return Record(path, run, "unfinished", good)


def _header(path: Path, data: bytes) -> dict[str, Any]:
    run = _line(path, data[: data.find(b"\n") + 1])
    texts = run["kind"] == "run" and [run[name] for name in ("task", "cell_id", "config_hash")]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _damaged(path, "has no header: its first line is not that of a run")
    if run["schema"] != SCHEMA:
        raise _damaged(path, f"has schema {run['schema']}, this code reads {SCHEMA}")
    if not isinstance(run["config"], dict) or not isinstance(run["machine"], dict):
        raise _damaged(path, "has no header: its configuration or its machine is not an object")
    return run


def _line(path: Path, text: bytes) -> dict[str, Any]:
    """One line with the fields of its kind."""
    try:
        line = json.loads(text)
        lacking = [name for name in FIELDS.get(line["kind"], ()) if name not in line]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _damaged(path, "has a line that is none of a record") from None
    if lacking or not text.startswith(b'{"kind": "'):
        raise _damaged(path, f"has a line that lacks {', '.join(lacking) or 'its kind in front'}")
    return line


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"record {path} {what}; delete it and run again")


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(as_plain(line), allow_nan=False).encode()
