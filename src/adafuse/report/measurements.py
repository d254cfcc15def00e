"""The one frame of measurements: every number of the report, a row each.

In: what latency.py, accuracy.py and routing.py measured. Out: a frame with the columns `COLUMNS`, its file
`results/measurements.csv.gz`, and that file read back. Next: claims.py, tables.py, figures.py, which read it alone.

    >>> load_measurements("results/measurements.csv.gz").query("experiment == 'table1' and quantity == 'ratio'")

`row` is an arm, a method or what else a cell is made of; `quantity` a name with its unit; `low` and `high` the 95 %
interval, empty where there is none (of a check, check.NAME, `high` is the bound); `n` the processes or seeds behind the
value, of ratios of times on how many `hosts`, and if these are several, `predict_low` and `predict_high` where the next
host's would lie, `within_low` and `within_high` the interval as if there were these hosts alone; `reason` says why
there is no value, how an interval was made, or, where a fact is a word (the cause of an exclusion, a checksum), that
word; `records` are the keys (frames.py) of the records behind it, space-separated: in the file the first digits that
tell them apart; `withdrawn` says why the number is not to be relied on until it is measured anew, and is empty for all
others.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from io import BytesIO
from pathlib import Path

import pandas as pd

from adafuse.files import put, read_bytes

# how a gzip file begins
GZIP = b"\x1f\x8b"
KEY = ["experiment", "cell", "row", "quantity"]
OF_HOSTS = ["predict_low", "predict_high", "within_low", "within_high"]
NUMBERS = dict.fromkeys(("value", "low", "high"), "float64") | {"n": "Int64", "hosts": "Int64"}
NUMBERS |= dict.fromkeys(OF_HOSTS, "float64")
COLUMNS = [*KEY, *NUMBERS, "reason", "records", "withdrawn"]


@dataclass(frozen=True)
class CellName:
    """What a cell of an experiment is called in print."""

    experiment: str
    cell: str
    title: str
    caption: str
    machine: str
    is_cpu: bool


@dataclass(frozen=True)
class RowName:
    """What a row of a cell is called in print, and what it is."""

    experiment: str
    cell: str
    row: str
    label: str
    method: str = ""
    routing: str = ""
    strategy: str = ""
    runtime: str = ""


@dataclass
class Measured:
    """What a module measured. `values`: all numbers, of COLUMNS; the names are for labels alone, in tables' order."""

    values: pd.DataFrame
    cells: list[CellName] = field(default_factory=list)
    rows: list[RowName] = field(default_factory=list)

    def __add__(self, more: Measured) -> Measured:
        values = pd.concat([self.values, more.values], ignore_index=True)
        return Measured(values, self.cells + more.cells, self.rows + more.rows)


ROWS = [one.name for one in fields(RowName)]


def told(found: pd.DataFrame) -> pd.DataFrame:
    """All columns of a frame with a line for each measurement, which lacks those that say nothing."""
    found = found.reindex(columns=COLUMNS).astype(NUMBERS).fillna({"reason": "", "withdrawn": ""})
    return found.assign(records=[" ".join(own) if isinstance(own, tuple) else "" for own in found["records"]])


def write(found: pd.DataFrame, path: Path) -> None:
    """Write the frame with 6 significant digits, the same bytes for the same records in any order.

    The 90 % interval of a difference and its deviation between seeds are left out: they follow from the 95 % interval
    and `n`; and so are the words of a check that was met, which are the same for all that bear its name.
    """
    told = found[~found["quantity"].str.startswith(("spread.", "minus90."))].sort_values(KEY, kind="stable")
    told["reason"] = told["reason"].mask(
        told["quantity"].str.startswith("check.") & (told["value"] <= told["high"]), ""
    )
    hashes = {record for records in told["records"].unique() for record in records.split()}
    short = next(own for own in map(_shortened, range(7, 65)) if len(set(map(own, hashes))) == len(hashes))
    told["records"] = told["records"].map(short)
    text = told.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode()
    put(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def is_behind(key: str, records: str) -> bool:
    """Whether a record (by its key, frames.py) is one of a number's, which a file names by their first digits."""
    own, names = key.split("."), [name.split(".") for name in records.split()]
    alike = [zip(own, name, strict=True) for name in names if len(name) == len(own)]
    return any(all(part.startswith(digits) for part, digits in parts) for parts in alike)


def _lacking(found: pd.DataFrame) -> dict[str, pd.Series]:
    names = [name for name in ("hosts", *OF_HOSTS) if name not in found]
    return {name: pd.Series(None, found.index, NUMBERS[name]) for name in names}


def _shortened(digits: int) -> Callable[[str], str]:
    """What leaves so many digits of each hash and card."""
    return partial(re.compile(rf"(\w{{{digits}}})\w+").sub, r"\1")


def load_measurements(path: Path | str) -> pd.DataFrame:
    """A written frame of measurements. Raises ValueError with one line for a file that is none."""
    kinds, empty = dict.fromkeys(COLUMNS, "str") | NUMBERS, {name: [""] for name in NUMBERS}
    try:
        content = read_bytes(Path(path))
        text = BytesIO(gzip.decompress(content) if content.startswith(GZIP) else content)
        found = pd.read_csv(text, dtype=kinds, keep_default_na=False, na_values=empty)
        # what older files lack: nothing was withdrawn, and hosts were not told
        return found.assign(withdrawn=found.get("withdrawn", ""), **_lacking(found))[COLUMNS]
    except (KeyError, OSError, ValueError, EOFError, zlib.error) as exc:
        raise ValueError(f"measurements {path} cannot be read: {' '.join(str(exc).split())}") from exc
