"""What an experiment consists of, written down when its jobs run: a record bears its cell's name, which many share.

In: the cell of a job, its command and its experiment. Out: rows of `<runs_dir>/records/membership.csv`, one for the
cell and one for each that it stands on, appended under a lock, none twice. Next: rebuild.py, which finds the rows again
from the records; report/, which reads them.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from adafuse import cell
from adafuse.config import Config, Task
from adafuse.files import disk_error, read_bytes
from adafuse.records import Record

FILE = "membership.csv"
# overrides that say how and where to run, not what
HOW = ("experiment", "profile", "runs_dir", "tracker", "device")
# A word of a key, or of an environment variable's name, that means its value is nobody's business; `block_tokens` has
# none of them.
SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials", "auth"}
# a value from the environment, a user in an address, a service's prefix, or letters and digits as no name has them
SECRET_VALUE = re.compile(
    r"env:|://[^/\s]*@|\b(hf_|sk-|gh[opsu]_|github_pat_|xox[abp]-|AKIA|AIza)[\w-]{8,}"
    r"|\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z\d+]{32,}"
)
# the same within a value: {api_key: ...}
SECRET_ENTRY = re.compile(rf"(?<![a-z\d])({'|'.join(sorted(SECRET_WORDS))})['\"]?\s*:", re.IGNORECASE)
# what is no name of anything: a key as well-known services make them, alone or within a value
KEY = re.compile(
    r"\b(?:hf_|sk-|wandb_v\d_)(?:(?=[a-z-]*[A-Z\d])[A-Za-z\d-]{10,}|[A-Za-z\d-]{20,})"
    r"|\b(?:gh[opsu]_|github_pat_|xox[abp]-|AKIA|AIza)[\w-]{12,}|://[^/\s:]*:[^/\s@]+@"
)
# wandb's older ones, which are no part of a path
WANDB_KEY = re.compile(r"(local-)?[\da-f]{40}")
FROM_ENVIRONMENT = re.compile(r"oc\.env:\s*(\w+)")
# a commit of a repository looks like a key and is none
PUBLIC = ("revision",)
MASK = "***"


@dataclass(frozen=True)
class Row:
    """A record's part in an experiment. `overrides` are the job's own, as Hydra takes them, with blanks between."""

    experiment: str
    profile: str
    task: str
    overrides: str
    record: str


COLUMNS = tuple(field.name for field in fields(Row))


def note(config: Config, command: str, experiment: str | None) -> None:
    """Write down that this job's cell, and all that it stands on, belong to `experiment` ("" without one).

    Raises OSError with one line if the file cannot be written.
    """
    own = job_overrides(command)
    rows = [
        Row(experiment or "", config.profile, one.task.name, own, _hash_of(one))
        for one in cell.with_needs(config)
    ]
    append(Path(config.runs_dir) / "records" / FILE, rows)


def job_overrides(command: str) -> str:
    """A job's own overrides, from the command in its record's header: what it is, without how it runs and secrets."""
    return joined(shown(one) for one in shlex.split(command)[2:] if not _says_how(one))


def joined(overrides: Iterable[str]) -> str:
    """Overrides with blanks between, quoted only where `shlex.split` would else not give them back."""
    return " ".join(one if re.fullmatch(r"[^\s'\"\\]+", one) else shlex.quote(one) for one in overrides)


def shown(override: str) -> str:
    """An override as it may be written down: a value that is secret, or may be, is masked."""
    key, equals, value = override.partition("=")
    words = re.split(r"[^a-z\d]+", key.lower())
    secret = bool(SECRET_WORDS.intersection(words) or SECRET_ENTRY.search(value))
    if words[-1] not in PUBLIC:
        secret |= SECRET_VALUE.search(value) is not None or _is_in_environment(value)
    return f"{key}{equals}{MASK}" if secret else override


def refuse_secrets(overrides: Iterable[str]) -> None:
    """Refuse what would be written down with the command. Raises ValueError with one line that does not show it."""
    for override in overrides:
        key, _, value = override.partition("=")
        why = _secret(key, value)
        if why:
            raise ValueError(
                f"{MASK if KEY.search(key) else key}={MASK} is {why}, and overrides are written down: leave it in the "
                "environment, where the libraries look for it"
            )


def _secret(key: str, value: str) -> str | None:
    """What makes this value a secret, if anything does."""
    for name in FROM_ENVIRONMENT.findall(value):
        lower = name.lower()
        if SECRET_WORDS & set(lower.split("_")) or lower.endswith(tuple(SECRET_WORDS)):
            return f"a secret by its name, {name}"
    public = re.split(r"\W+", key.lower())[-1] in PUBLIC
    if KEY.search(f"{key}={value}") or (not public and WANDB_KEY.fullmatch(value.strip("'\""))):
        return "a secret by its form"
    return "what a secret of the environment is" if not public and _is_in_environment(value) else None


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add the rows that are not there, each once, whole and flushed; half a line that a crash left goes.

    Raises ValueError with one line for a link, OSError with one line if the disk does not take them.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, through which nothing is written: delete it or move it away")
    wanted = once(rows)
    if path.exists() and wanted.keys() <= once(read(path)).keys():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            there = file.read()
            there = there[: there.rfind(b"\n") + 1]
            known = once(_rows(there))
            new = [astuple(row) for key, row in wanted.items() if key not in known]
            file.truncate(len(there))
            file.write(as_csv(new if there else [COLUMNS, *new]))
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise disk_error(path, exc) from exc


def read(path: Path) -> list[Row]:
    """The rows of a file; a line that is none is passed over."""
    return _rows(read_bytes(path))


def once(rows: Iterable[Row]) -> dict[Row, Row]:
    """Each row once, in order; of a pre-training, on which all jobs of an experiment stand, that of the first job."""
    found: dict[Row, Row] = {}
    for row in rows:
        found.setdefault(replace(row, overrides="") if row.task == Task.pretrain.name else row, row)
    return found


def unlisted(records: Iterable[Record], rows: Iterable[Row]) -> list[Record]:
    """The records that no row names: of whatever experiment, they are shown."""
    listed = {row.record for row in rows}
    return [record for record in records if record.run["config_hash"] not in listed]


def as_csv(rows: Iterable[Iterable[str]]) -> bytes:
    """The bytes of these lines."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _rows(data: bytes) -> list[Row]:
    lines = csv.reader(io.StringIO(data[: data.rfind(b"\n") + 1].decode("utf-8", "replace"), newline=""))
    cut = (line[: len(COLUMNS)] for line in lines if len(line) >= len(COLUMNS))
    return [Row(*line) for line in cut if tuple(line) != COLUMNS]


def _hash_of(config: Config) -> str:
    """The hash under which the record is, or will be."""
    known = cell.known_records(config)
    return next((one for path, one in known.items() if path.exists()), next(iter(known.values())))


def _says_how(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key in HOW or key.startswith(("hydra", "-"))


def _is_in_environment(value: str) -> bool:
    """Whether the shell put a secret of the environment here."""
    secrets = [
        v for name, v in os.environ.items() if SECRET_WORDS & set(name.lower().split("_")) and len(v) >= 8
    ]
    return any(secret in value for secret in secrets)
