"""What routers do: how many experts they really use, whether they collapse, and what a choice tells of the family.

In: train records with `routing` lines. Out: `Use`s and the sheet `routing`. Next: routing_figure.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adafuse.records import Record
from adafuse.report.accuracy import heading, is_pilot
from adafuse.report.agreement import agreement_text, agreements
from adafuse.report.cells import Cell, caption, cells, short_name
from adafuse.report.fits import fit_key
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits, share_text
from adafuse.report.variants import variants

# of the way from top-k, the fewest experts that a router can use, to all of them
COLLAPSED = 0.25
ALL = "all"
ABOUT = (
    "Which experts the routers choose on held-out items, mean over routers and seeds. Effective experts: the "
    "exponential of the entropy of the load; at least top-k, at most all. Entropy: of the softmax of one token. "
    f"Collapsed: the share of routers whose effective number is less than {100 * COLLAPSED:.0f} % of the way from "
    "top-k to all; few experts in one family but many over all are a division of labour, and no collapse. Tells "
    "family: the mutual information of family and chosen expert over the entropy of the family, families weighing "
    "the same; 1 where the expert gives the family away. Left alone: tokens without any expert."
)


@dataclass(frozen=True)
class Use:
    """One method on one family (or on all, which weigh the same)."""

    family: str
    routers: int
    effective: float | None
    entropy_nats: float | None
    collapsed: float | None
    bypassed: float | None
    tells_family: float | None


def effective_number(load: ArrayLike) -> float:
    """How many equally loaded experts would have this entropy."""
    return math.exp(_entropy(np.asarray(load, float)))


def routing_cells(records: list[Record], varied: Iterable[Record]) -> list[Cell]:
    """The cells of adapters with routers, without those that only a study of one knob trained."""
    keys = {fit_key(record) for record in varied}
    fitted = [record for record in records if record.run.get("task") == "train" and not is_pilot(record)]
    own = [record for record in fitted if record.of("routing")]
    return [
        cell for cell in cells(own, "train") if any(fit_key(record) not in keys for record in cell.records)
    ]


def uses(records: Iterable[Record]) -> list[Use]:
    """What the routers of these records do, on all families and on each of them."""
    known = [record for record in records if _lines(record)]
    families = dict.fromkeys(line.get("family", ALL) for record in known for line in _lines(record))
    return [_use(known, family) for family in dict.fromkeys([ALL, *families])] if known else []


def loads(record: Record, router: str) -> dict[str, NDArray[np.float64]]:
    """The load of one router by family, where it has any."""
    own = [line for line in _lines(record) if line["router"] == router]
    known = {line.get("family", ALL): np.nan_to_num(np.asarray(line["load"], float)) for line in own}
    # where every token is left to the backbone no expert has a load
    return {family: load for family, load in known.items() if load.sum() > 0}


def routers(record: Record) -> list[str]:
    """The routers that have lines, in running order."""
    return list(dict.fromkeys(line["router"] for line in _lines(record)))


def tells_family(record: Record, router: str) -> float | None:
    """Mutual information of family and chosen expert over the family's entropy; None for one family."""
    known = np.array(list(loads(record, router).values()))
    if len(known) < 2:
        return None
    within = float(np.mean([_entropy(load) for load in known]))
    return (_entropy(known.mean(axis=0)) - within) / math.log(len(known))


def routing_table(found: list[Cell]) -> Sheet:
    """A row for each method and family."""
    columns: Columns = {
        "method": lambda row: row["method"],
        "family": lambda row: row["family"],
        "routers": lambda row: str(row["routers"]),
        "effective experts": lambda row: digits(row["effective"]),
        "entropy, nats": lambda row: digits(row["entropy_nats"]),
        "collapsed": lambda row: share_text(row["collapsed"]),
        "tells family": lambda row: GAP if row["tells_family"] is None else f"{row['tells_family']:.2f}",
        "left alone": lambda row: share_text(row["bypassed"]),
        "seeds": lambda row: str(row["seeds"]),
    }
    sections = [Section(heading(cell), caption(cell), _rows(cell), columns, _notes(cell)) for cell in found]
    return Sheet("routing", "What the routers do", ABOUT, sections or [nothing("no adapter was trained")])


def _notes(cell: Cell) -> list[str]:
    return [agreement_text(one) for one in agreements(cell)]


def _rows(cell: Cell) -> list[Row]:
    rows: list[Row] = []
    for name, records in variants(list(cell.finished)).items():
        seeds = len({record.run.get("seed", 0) for record in records})
        files = [short_name(record) for record in records]
        rows += [{"method": name} | vars(use) | {"seeds": seeds, "records": files} for use in uses(records)]
    return rows


def _use(records: list[Record], family: str) -> Use:
    pairs = [(record, router) for record in records for router in routers(record)]
    effective, collapsed = [], []
    for record, router in pairs:
        load = _load(loads(record, router), family)
        if load is not None:
            fewest = record.run["config"]["experts"]["top_k"]
            effective.append(effective_number(load))
            collapsed.append(effective[-1] < fewest + COLLAPSED * (len(load) - fewest))
    lines = [line for r in records for line in _lines(r) if family in (ALL, line.get("family", ALL))]
    told = [tells_family(*pair) for pair in pairs] if family == ALL else []
    return Use(
        family,
        len(pairs) // len(records),
        _mean(effective),
        _mean([line["entropy_nats"] for line in lines]),
        _mean(collapsed),
        _mean([line.get("bypassed") for line in lines]),
        _mean(told),
    )


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _load(by_family: dict[str, NDArray[np.float64]], family: str) -> NDArray[np.float64] | None:
    """Of one family; of all the mean, so that they weigh the same."""
    if family != ALL or ALL in by_family or not by_family:
        return by_family.get(family)
    return np.asarray(np.mean(list(by_family.values()), axis=0))


def _lines(record: Record) -> list[dict[str, Any]]:
    return [line for line in record.of("routing") if line["load"]]


def _entropy(load: NDArray[np.float64]) -> float:
    share = load[load > 0] / load.sum()
    return float(-(share * np.log(share)).sum())
