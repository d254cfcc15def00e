"""One small record, and ways in which a file among records is none."""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adafuse.records import SEAL, open_record
from synthetic import runs

HEADER = runs.run_fields("latency", "cell", runs.config())


def write_one(path: Path, **changes: Any) -> Path:
    """A finished record of one metric; `changes` are of its header."""
    with open_record(path, HEADER | changes) as record:
        record.write("metric", suite_task="copy", metric="acc", value=0.5, stderr=0.1, n=4)
    return path


def write_sealed(path: Path, *lines: str) -> None:
    """Any lines, with an end line whose checksum is right."""
    body = "".join(f"{line}\n" for line in lines).encode() + b'{"kind": "end", "status": "ok", "seconds": 1'
    body += b', "peak_rss_gib": 1'
    path.write_bytes(body + SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n')


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        one.bind(path.name)
        os.chdir(here)


def _line(**fields: Any) -> str:
    return json.dumps({"kind": "run", "schema": 1, **HEADER} | fields)


# by what is wrong: the file's name, and who makes it
STRAY: dict[str, tuple[str, Callable[[Path], object]]] = {
    "braces": ("x.jsonl.partial", lambda path: path.write_text("{}\n")),
    "empty": ("x.jsonl.partial", lambda path: path.write_text("")),
    "a list": ("x.jsonl.partial", lambda path: path.write_text("[1]\n")),
    "no kind": ("x.jsonl.partial", lambda path: path.write_text('{"task": "latency"}\n')),
    "config is a word": ("x.jsonl.partial", lambda path: path.write_text(_line(config="c") + "\n")),
    "task is a number": ("x.jsonl.partial", lambda path: path.write_text(_line(task=1) + "\n")),
    "another schema": ("x.jsonl.partial", lambda path: path.write_text(_line(schema=2) + "\n")),
    "not UTF-8": ("x.jsonl.partial", lambda path: path.write_bytes(b'{"kind": "run\xff"}\n')),
    "deep": ("x.jsonl.partial", lambda path: path.write_text("[" * 100_000 + "\n")),
    "no end": ("x.jsonl", lambda path: path.write_text(_line() + "\n")),
    "no header": ("x.jsonl", lambda path: write_sealed(path, '{"kind": "routing"}')),
    "no fields": ("x.jsonl", lambda path: write_sealed(path, _line(), '{"kind": "block", "arm": "base"}')),
    "deep, sealed": ("x.jsonl", lambda path: write_sealed(path, _line(), '{"kind": ' + "[" * 100_000)),
    "binary": ("x.jsonl", lambda path: path.write_bytes(bytes(range(256)) * 40)),
    "folder": ("x.jsonl", Path.mkdir),
    "FIFO": ("x.jsonl", os.mkfifo),
    "unfinished FIFO": ("x.jsonl.partial", os.mkfifo),
    "archive that is a FIFO": ("x.parquet", os.mkfifo),
    "socket": ("x.jsonl", _socket),
    "dead link": ("x.jsonl", lambda path: path.symlink_to("nowhere")),
    "endless device": ("x.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "no archive": ("x.parquet", lambda path: path.write_text("PAR1 and nothing else")),
    "empty archive": ("x.parquet", lambda path: path.write_text("")),
}
