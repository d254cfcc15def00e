"""One's own run beside the published one, measurement by measurement.

In: two frames of measurements. Out: a frame with an outcome a row, for templates/compare.md.j2.

Compared is what does not hang on how fast a machine is: ratios, counts, accuracies. Cells meet by all but the
machine. Two numbers are the same where their intervals overlap, of a published ratio over hosts where the next host's
would lie; without intervals, to TOLERANCE.
"""

from __future__ import annotations

import pandas as pd

from adafuse.report.formats import GAP, hosts_text, points_text
from adafuse.report.rules import Number

SAME, DIFFERENT = "same", "different beyond the intervals"
NOT_HERE, NOT_THERE = "missing in your run", "missing in the published one"
WITHDRAWN = "withdrawn on either side"
OUTCOMES = (SAME, DIFFERENT, NOT_HERE, NOT_THERE, WITHDRAWN)
# the first word of a quantity's name
FREE = ("ratio", "gemv_ratio", "gate_ratio", "over", "accuracy", "minus", "loss_minus", "params", "macs")
# a written number has six digits
TOLERANCE, ROUNDED = 1e-3, 1e-5
KEY = ["experiment", "at", "row", "quantity"]
_OF_NEXT_HOST = ("predict_low", "predict_high")


def compare(own: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Every measurement of the cells that both have, as text on either side, with its `outcome`."""
    here, there = _free(own), _free(published, _OF_NEXT_HOST)
    both = here[KEY[:2]].merge(there[KEY[:2]]).drop_duplicates()
    found = here.merge(there, on=KEY, how="outer", suffixes=("", "_published")).merge(both, on=KEY[:2])
    overlap = (found["low"] <= found["high_published"]) & (found["low_published"] <= found["high"])
    outcome = overlap.map({True: SAME, False: DIFFERENT}).mask(found["text"].isna(), NOT_HERE)
    outcome = outcome.mask(found["text_published"].isna(), NOT_THERE)
    gone = [found[f"withdrawn{side}"].fillna("").ne("") for side in ("", "_published")]
    found["outcome"] = outcome.mask(gone[0] | gone[1], WITHDRAWN)
    found = found.fillna({"text": GAP, "text_published": GAP})
    return found.sort_values(KEY, kind="stable", ignore_index=True)


def _free(found: pd.DataFrame, ends: tuple[str, str] = ("low", "high")) -> pd.DataFrame:
    """What can be compared across machines, of several the first. `at`: a cell's key without its first word,
    the machine; `low` and `high`: the `ends` where a number has them, a little wider than a written number is rounded.
    """
    found = found[found["quantity"].str.partition(".")[0].isin(FREE) & found["value"].notna()]
    found = found.assign(at=found["cell"].str.partition(" ")[2]).drop_duplicates(KEY)
    hosts = found["hosts"].fillna(0)
    columns = (found[name] for name in ("value", "low", "high", *_OF_NEXT_HOST))
    numbers = [
        Number(*own, hosts=count, predict_low=low, predict_high=high)
        for *own, low, high, count in zip(*columns, hosts, strict=True)
    ]
    points = found["quantity"].str.startswith(("accuracy.", "minus."))
    text = [points_text(own) if of else hosts_text(own) for own, of in zip(numbers, points, strict=True)]
    near = found["value"].abs() * found["low"].isna().map({True: TOLERANCE / 2, False: ROUNDED})
    low, high = (
        found[end].fillna(found[usual]).fillna(found["value"])
        for end, usual in zip(ends, ("low", "high"), strict=True)
    )
    low, high = low - near, high + near
    return found[[*KEY, "withdrawn"]].assign(text=text, low=low, high=high)
