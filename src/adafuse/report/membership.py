"""Which experiment a record belongs to: read from the file that runs write, never guessed from settings.

In: `membership.csv`, a row for each experiment that a record serves, or nothing. Out: a frame with the columns
`COLUMNS`. Where there is no file a record serves the experiment that its own header names. Next: frames.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from adafuse.records import Record

# `record` is the hash at the end of a record's file name; `overrides` is sorted, without what says only where and how
# a job ran.
COLUMNS = ["experiment", "profile", "task", "overrides", "record"]
ELSEWHERE = ("experiment=", "profile=", "runs_dir=", "tracker=", "device=", "hydra", "-")
# Overrides that make a job a repeat of another one.
REPEATS = ("seed", "replicate")
HASH = re.compile("[0-9a-f]{12}")


def read(path: Path) -> pd.DataFrame:
    """The rows of a membership file, each once. Raises ValueError with one line for a file that is none."""
    try:
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as exc:
        raise ValueError(f"membership {path} cannot be read: {' '.join(str(exc).split())}") from exc
    lacking = [name for name in COLUMNS if name not in found]
    if lacking:
        raise ValueError(f"membership {path} lacks the columns {', '.join(lacking)}")
    odd = [record for record in found["record"] if not HASH.fullmatch(record)]
    if odd:
        raise ValueError(f"membership {path} names a record that is no hash of 12 digits: {odd[0][:40]!r}")
    found["overrides"] = found["overrides"].map(canonical)
    return found[COLUMNS].drop_duplicates().reset_index(drop=True)


def of_headers(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, as its own header has it: the experiment and the command that made it."""
    rows = [[*_header_row(record.run), hash_of(record.path)] for record in records]
    return pd.DataFrame(rows, columns=COLUMNS)


def hash_of(path: Path) -> str:
    """The hash at the end of a record's file name."""
    return path.name.split(".jsonl")[0].rpartition("-")[2]


def canonical(overrides: str) -> str:
    """The same overrides in the one order in which they are compared."""
    return " ".join(sorted(overrides.split()))


def coordinates(overrides: str) -> dict[str, str]:
    """What the overrides of a job set beyond which repeat it is: `{"batch": "8"}` of `batch=8 replicate=0`."""
    pairs = (word.partition("=")[::2] for word in overrides.split())
    return {name.lstrip("+"): value for name, value in pairs if name not in REPEATS}


def _header_row(run: dict[str, object]) -> list[str]:
    words = shlex.split(str(run.get("command") or ""))
    own = [word for word in words if "=" in word and not word.startswith(ELSEWHERE)]
    head = [str(run.get(name) or "") for name in ("experiment", "profile", "task")]
    return [*head, canonical(" ".join(own))]
