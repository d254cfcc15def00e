"""Records as data frames, for the report and for notebooks.

In: records that were read back. Out: pandas frames with the lines of one kind. Next: report/cells.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from adafuse.records import FIELDS, Record

if TYPE_CHECKING:
    import pandas as pd

# What `frame` joins to every line, from the header.
HEADER = ("task", "cell_id", "config_hash", "experiment", "profile", "seed", "replicate")


def frame(records: Iterable[Record], kind: str) -> pd.DataFrame:
    """All lines of one kind as a data frame, joined with HEADER, machine, status and file of their record."""
    import pandas as pd

    rows = []
    for record in records:
        header = {name: record.run.get(name) for name in HEADER}
        header["machine"] = record.run.get("machine", {}).get("name")
        header |= {"status": record.status, "path": str(record.path)}
        rows += [header | {k: v for k, v in line.items() if k != "kind"} for line in record.of(kind)]
    columns = [*HEADER, "machine", "status", "path", *FIELDS[kind]]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def counted_blocks(record: Record) -> pd.DataFrame:
    """The timed blocks of one record without those that must not count: excluded at once, or flagged at the end."""
    import numpy as np

    blocks = frame([record], "block")
    flagged = {(line["arm"], line["round"]) for line in record.of("flag")}
    kept = [pair not in flagged for pair in zip(blocks["arm"], blocks["round"], strict=True)]
    return blocks[blocks["excluded"].isna() & np.array(kept, bool)]
