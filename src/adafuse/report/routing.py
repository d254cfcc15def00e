"""What routers do: how many experts they really use, whether they collapse, what a choice tells, whether layers agree.

In: the training behind the rows of accuracy.py. Out: numbers of the same rows; what the figures `load` and `agreement`
draw. Next: figures.py. Quantities, means over routers and adapters, over all families (which weigh the same) or with
`.FAMILY` on one:

    effective_experts   the exponential of the entropy of the load; at least top-k, at most all
    collapsed           the share of routers with less than COLLAPSED of the way from top-k to all
    entropy_nats, bypassed   of the softmax of one token; the share of tokens without any expert
    tells_family        mutual information of family and chosen expert over the entropy of the family; 1: all
    between_layers, within_block   normalised mutual information of two routers' first choices, over pairs; 1: all
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adafuse.report.accuracy import ROW, studies
from adafuse.report.frames import Frames
from adafuse.report.measurements import KEY, Measured, told

# of the way from top-k, the fewest experts that a router can use, to all of them
COLLAPSED = 0.25
BLOCK = re.compile(r"layers\.(\d+)\.")
ROUTER = ["record", "router"]
# per router and family, and per router over all families
BY_FAMILY = ["effective_experts", "collapsed", "entropy_nats", "bypassed"]
BY_ROUTER = ["effective_experts", "collapsed", "tells_family"]


@dataclass(frozen=True)
class Uses:
    """`lines`: a row for each adapter (`record`), router and family, with BY_FAMILY; `routers`: by record and router
    BY_ROUTER. nan where every token is left to the backbone, and for the family that one family tells.
    """

    lines: pd.DataFrame
    routers: pd.DataFrame


def measure(found: Frames) -> Measured:
    """What the routers of every row of every study do, as far as its training says it."""
    fits = studies(found)[[*ROW, "fits"]].explode("fits").dropna().drop_duplicates()
    used = pd.concat([_used(uses(found)), _agreed(found)]).join(
        found.runs[["withdrawn", "wrong"]], on="record"
    )
    # what is told of a family that its training had right is not withdrawn, nor is a count
    each = zip(used["quantity"], used.pop("wrong"), strict=True)
    is_right = [name == "routers" or name.partition(".")[2] not in ("", *wrong) for name, wrong in each]
    used["withdrawn"] = used["withdrawn"].mask(np.array(is_right, bool), "")
    by = fits.merge(used, left_on="fits", right_on="record").groupby(KEY, sort=False)
    lists: Any = {"total": ("total", list), "records": ("record", tuple), "withdrawn": ("withdrawn", "max")}
    own = by.agg(count=("count", "sum"), **lists).reset_index()
    return Measured(told(own.assign(value=own["total"].map(sum) / own["count"], n=own["total"].map(len))))


@lru_cache(maxsize=1)
def uses(found: Frames) -> Uses:
    """What every trained router does, from the `routing` lines of training; older ones do not tell families apart."""
    lines = found.lines("routing", "train")
    lines = lines.reindex(columns=[*ROUTER, "family", "load", "entropy_nats", "bypassed"])
    is_known = [isinstance(load, list) and len(load) > 0 for load in lines["load"]]
    lines = lines[np.array(is_known, bool)].reset_index(drop=True)
    top_k = lines["record"].map(found.runs["top_k"]).astype(float)
    lines = lines.assign(experts=lines["load"].map(len), top_k=top_k)
    # the share of the chosen slots, zeros behind the last expert
    slots = pd.DataFrame(lines["load"].tolist(), dtype=float).fillna(0.0)
    entropy, keys = _entropy(slots), [lines[name] for name in ROUTER]
    # where every token of a family is left to the backbone it has no load, and no part in the mean
    over = _entropy(slots.where(entropy.notna()).groupby(keys, sort=False).mean())
    families = entropy.groupby(keys, sort=False).agg(["mean", "count"])
    told = ((over - families["mean"]) / np.log(families["count"])).where(families["count"] > 1)
    routers = _effective(over, lines.drop_duplicates(ROUTER).set_index(ROUTER))
    return Uses(lines.join(_effective(entropy, lines)), routers.assign(tells_family=told))


def load_map(used: Uses, record: str) -> pd.DataFrame:
    """The load of an adapter's first router, a row a family, a column an expert; families without any are left out."""
    own = used.lines[used.lines["record"] == record]
    own = own[(own["router"] == own["router"].iloc[0]) & own["effective_experts"].notna()]
    return pd.DataFrame(own["load"].tolist(), own["family"])


def agreement(found: Frames, records: Iterable[str]) -> tuple[list[str], NDArray[np.float64]] | None:
    """Routers in running order, and how much one's choice tells of another's, mean over adapters; None if none does."""
    lines = _compared(found)
    lines = lines[lines["record"].isin(list(records))]
    if lines.empty:
        return None
    return list(lines["routers"].iloc[0]), np.array(lines["information"].tolist(), float).mean(axis=0)


def blocks(routers: Iterable[str]) -> list[str]:
    """The number of the backbone's block in which each router stands; its own name where it stands in none."""
    return [found.group(1) if (found := BLOCK.search(router)) else router for router in routers]


def _used(used: Uses) -> pd.DataFrame:
    """By adapter and quantity the sum over its routers and their number: columns record, quantity, total, count."""
    routers = used.routers.reset_index()
    by_family = used.lines.dropna(subset="family").melt(["record", "family"], BY_FAMILY, "quantity")
    named = zip(by_family["quantity"], by_family["family"], strict=True)
    by_family["quantity"] = [f"{quantity}.{family}" for quantity, family in named]
    every = used.lines.melt("record", BY_FAMILY[2:], "quantity")
    parts = [routers.melt("record", BY_ROUTER, "quantity"), every, by_family]
    long = pd.concat(parts).astype({"value": float}).dropna(subset="value")
    summed = long.groupby(["record", "quantity"])["value"].agg(total="sum", count="count").reset_index()
    number = routers.groupby("record").size().rename("total").reset_index()
    return pd.concat([summed, number.assign(quantity="routers", count=1)])


def _agreed(found: Frames) -> pd.DataFrame:
    """By adapter how much two of its routers tell of each other; columns as of `_used`."""
    rows = []
    for line in list[Any](_compared(found).itertuples()):
        own, matrix = np.array(blocks(line.routers)), np.array(line.information, float)
        apart = ~np.eye(len(own), dtype=bool)
        pairs = {"between_layers": apart, "within_block": apart & (own[:, None] == own)}
        rows += [(line.record, name, matrix[at].mean(), 1) for name, at in pairs.items() if at.any()]
    return pd.DataFrame(rows, columns=["record", "quantity", "total", "count"])


def _compared(found: Frames) -> pd.DataFrame:
    lines = found.lines("agreement", "train")
    return lines[lines["routers"].map(len) > 1]


def _effective(entropy: pd.Series, routers: pd.DataFrame) -> pd.DataFrame:
    """How many equally loaded experts would have this entropy, and whether they are too few."""
    effective, top_k = np.exp(entropy), routers["top_k"]
    collapsed = (effective < top_k + COLLAPSED * (routers["experts"] - top_k)).where(entropy.notna())
    return pd.DataFrame({"effective_experts": effective, "collapsed": collapsed.astype(float)})


def _entropy(slots: pd.DataFrame) -> pd.Series:
    """Of each row, in nats; nan for one without any load."""
    share = slots.to_numpy(float) / slots.sum(axis=1).where(slots.sum(axis=1) > 0).to_numpy(float)[:, None]
    return pd.Series(-(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1), index=slots.index)
