"""Whether layers agree: how much two routers' choices tell of each other, the paper's unmeasured motive for one gate.

In: train records with an `agreement` line. Out: the mean matrix of a method over its seeds, and its mean. Next:
routing_figure.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adafuse.records import Record
from adafuse.report.cells import Cell
from adafuse.report.variants import variants

BLOCK = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Agreement:
    """One method: routers in running order, and for each pair the normalised information, mean over its adapters."""

    method: str
    routers: tuple[str, ...]
    information: NDArray[np.float64]
    by_adapter: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over all pairs of two routers."""
        return float(np.mean(self.by_adapter))

    @property
    def blocks(self) -> list[int]:
        """Where a new block of the backbone begins."""
        own = [block_of(router) for router in self.routers]
        return [index for index in range(1, len(own)) if own[index] != own[index - 1]]

    @property
    def within_blocks(self) -> float | None:
        """Over pairs of routers of one block alone; None where a block has one router."""
        own = np.array([block_of(router) for router in self.routers])
        pairs = (own[:, None] == own[None, :]) & ~np.eye(len(own), dtype=bool)
        return float(self.information[pairs].mean()) if pairs.any() else None


def agreements(cell: Cell) -> list[Agreement]:
    """Every method of a cell of train records whose routers were compared."""
    found = [_agreement(name, records) for name, records in variants(list(cell.finished)).items()]
    return [one for one in found if one]


def block_of(router: str) -> str:
    """The number of the backbone's block in which a router stands; its own name if it stands in none."""
    found = BLOCK.search(router)
    return found.group(1) if found else router


def agreement_text(one: Agreement) -> str:
    """A note under the table."""
    within = "" if one.within_blocks is None else f", {one.within_blocks:.2f} within a block"
    return (
        f"How much the first choices of two routers of {one.method} tell of each other, normalised mutual information, "
        f"mean over pairs and adapters: {one.mean:.2f}{within}; 0: nothing, 1: all (figure agreement)."
    )


def _agreement(name: str, records: Iterable[Record]) -> Agreement | None:
    lines = [line for record in records for line in record.of("agreement") if len(line["routers"]) > 1]
    if not lines:
        return None
    matrices = np.array([line["information"] for line in lines], float)
    pairs = ~np.eye(matrices.shape[1], dtype=bool)
    means = tuple(float(matrix[pairs].mean()) for matrix in matrices)
    return Agreement(name, tuple(lines[0]["routers"]), matrices.mean(axis=0), means)
