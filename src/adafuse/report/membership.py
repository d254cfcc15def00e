"""Which experiment a record belongs to: read from the file that runs write, never guessed from settings.

In: `membership.csv`, a row for each experiment that a record serves; where there is none, the headers of records. Out:
a frame with the columns `COLUMNS`. Next: frames.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pandas as pd

from adafuse.files import read_bytes
from adafuse.records import Record

# `record`: the hash at the end of a record's file name; `overrides`: sorted, without what says how a job ran
COLUMNS = ["experiment", "profile", "task", "overrides", "record"]
ELSEWHERE = ("experiment=", "profile=", "runs_dir=", "tracker=", "device=", "hydra", "-")


def read(path: Path) -> pd.DataFrame:
    """The rows of a membership file, each once. Raises ValueError with one line for a file that is none."""
    try:
        found = pd.read_csv(BytesIO(read_bytes(path)), dtype=object, keep_default_na=False)[COLUMNS]
    except KeyError as exc:
        raise ValueError(f"membership {path} lacks columns: {exc.args[0]}") from exc
    except (OSError, ValueError) as exc:
        raise ValueError(f"membership {path} cannot be read: {' '.join(str(exc).split())}") from exc
    for odd in found.loc[~found["record"].str.fullmatch("[0-9a-f]{12}"), "record"]:
        raise ValueError(f"membership {path} names a record that is no hash of 12 digits: {odd[:40]!r}")
    found["overrides"] = [_joined(sorted(_split(words))) for words in found["overrides"]]
    return found.drop_duplicates(ignore_index=True)


def of_headers(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, as its own header has it: the experiment and the command that made it."""
    rows = []
    for record in records:
        words = shlex.split(str(record.run.get("command") or ""))
        own = sorted(word for word in words if "=" in word and not word.startswith(ELSEWHERE))
        head = [str(record.run.get(name) or "") for name in COLUMNS[:3]]
        rows.append([*head, _joined(own), hash_of(record.path)])
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)


def hash_of(path: Path) -> str:
    """The hash at the end of a record's file name, before its card if that is told (archive.py)."""
    return path.name.split(".jsonl")[0].rpartition("-")[2].partition(".")[0]


def coordinates(overrides: str) -> dict[str, str]:
    """What the overrides of a job set beyond which repeat it is: `{"batch": "8"}` of `batch=8 replicate=0`."""
    pairs = (word.partition("=")[::2] for word in _split(overrides))
    return {name.lstrip("+"): value for name, value in pairs if name not in ("seed", "replicate")}


def _split(overrides: str) -> list[str]:
    """A path may hold blanks and is quoted then; of thousands few are, and shlex is slow."""
    if "'" in overrides or '"' in overrides:
        # a line that somebody else wrote need not be the shell's
        with suppress(ValueError):
            return shlex.split(overrides)
    return overrides.split()


def _joined(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(word) if re.search(r"[\s'\"\\]", word) else word for word in words)
