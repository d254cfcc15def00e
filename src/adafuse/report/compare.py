"""One's own run beside the published one, measurement by measurement.

In: two frames of measurements. Out: a frame with an outcome a row, and Markdown. Next: scripts/report.py.

Compared is what does not hang on how fast a machine is: ratios, counts, accuracies. Cells meet by everything but the
machine. Two numbers are the same where their intervals overlap; without intervals, where they agree to TOLERANCE.
"""

from __future__ import annotations

import pandas as pd

from adafuse.report import formats
from adafuse.report.rules import Number

SAME, DIFFERENT = "same", "different beyond the intervals"
NOT_HERE, NOT_THERE = "missing in your run", "missing in the published one"
OUTCOMES = (SAME, DIFFERENT, NOT_HERE, NOT_THERE)
# the first word of a quantity's name
FREE = ("ratio", "gemv_ratio", "gate_ratio", "over", "accuracy", "minus", "loss_minus", "params", "macs")
TOLERANCE = 1e-3
# of six digits
ROUNDED = 1e-5
KEY = ["experiment", "at", "row", "quantity"]


def compare(own: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Every measurement of the experiments and cells that both have, with its `outcome`."""
    here, there = _free(own), _free(published)
    both = here[["experiment", "at"]].merge(there[["experiment", "at"]]).drop_duplicates()
    joined = here.merge(there, on=KEY, how="outer", suffixes=("", "_published")).merge(both, on=KEY[:2])
    joined["outcome"] = [_outcome(row) for _, row in joined.iterrows()]
    return joined.sort_values(KEY, kind="stable").reset_index(drop=True)


def markdown(found: pd.DataFrame) -> str:
    """How many agree, by experiment; then each number that does not, or that one side lacks."""
    counts = pd.crosstab(found["experiment"], found["outcome"]).reindex(columns=list(OUTCOMES), fill_value=0)
    parts = ["# Your run beside the published one"]
    if found.empty:
        parts.append(
            "No experiment and cell is in both: run one of the published experiments in the same profile."
        )
    else:
        parts.append(counts.reset_index().to_markdown(index=False))
    for outcome in OUTCOMES[1:]:
        own = found[found["outcome"] == outcome]
        shown = own.assign(yours=_texts(own, ""), published=_texts(own, "_published"))
        names = {"experiment": "experiment", "at": "cell", "row": "row", "quantity": "quantity"}
        columns = [
            *names,
            *(["yours"] if outcome != NOT_HERE else []),
            *(["published"] if outcome != NOT_THERE else []),
        ]
        if len(own):
            table = shown[columns].rename(columns=names).to_markdown(index=False, disable_numparse=True)
            parts += [f"## {outcome.capitalize()}", table]
    return "\n\n".join(parts) + "\n"


def _free(found: pd.DataFrame) -> pd.DataFrame:
    """What can be compared across machines, with `at`: the cell's key without the machine, which is its first word; of
    several machines the first.
    """
    free = found[found["quantity"].str.partition(".")[0].isin(FREE) & found["value"].notna()]
    free = free.assign(at=free["cell"].str.partition(" ")[2])
    return free.drop_duplicates(KEY)[[*KEY, "value", "low", "high", "n"]]


def _outcome(row: pd.Series) -> str:
    if pd.isna(row["value"]):
        return NOT_HERE
    if pd.isna(row["value_published"]):
        return NOT_THERE
    one, two = _ends(row, ""), _ends(row, "_published")
    return SAME if one[0] <= two[1] and two[0] <= one[1] else DIFFERENT


def _ends(row: pd.Series, side: str) -> tuple[float, float]:
    """The interval, or what is as good as the bare value; both a little wider than a written number is rounded."""
    value, low, high = (float(row[f"{name}{side}"]) for name in ("value", "low", "high"))
    near = abs(value) * (TOLERANCE / 2 if pd.isna(low) else ROUNDED)
    return (value - near, value + near) if pd.isna(low) else (low - near, high + near)


def _texts(found: pd.DataFrame, side: str) -> list[str]:
    columns = found[["quantity", *(f"{name}{side}" for name in ("value", "low", "high"))]].itertuples(
        index=False
    )
    return [
        formats.points_text(Number(*number))
        if quantity.startswith(("accuracy.", "minus."))
        else formats.ratio_text(Number(*number))
        for quantity, *number in columns
    ]
