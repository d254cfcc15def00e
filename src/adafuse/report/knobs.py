"""The settings whose effect is studied one at a time.

In: nothing. Out: `KNOBS`. Next: why_studies.py, which finds the records that differ in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adafuse.report.older import entry
from adafuse.report.variants import DERIVED

Config = dict[str, Any]
GATE_INPUTS = ("first_linear", "embedding", "block0_output")
METHOD, BYPASS, GATE_INPUT = "method", "bypass", "router_input"
RATE_FACTOR = "learning_rate_factor"


@dataclass(frozen=True)
class Knob:
    """One setting: what it is called, how a configuration has it, and the entries that move with it.

    Where only AdaFuse has it, methods that have not are shown `beside` it, as levels.
    """

    name: str
    words: str
    value: Callable[[Config], Any]
    entries: tuple[tuple[str, str], ...]
    beside: bool = False


def learning_rate(config: Config) -> float:
    """The rate at which a method was trained: the stage's, times the method's own factor."""
    rate: float = config.get("train", {}).get("learning_rate", 0.0)
    # a product of decimals: 3e-3 times 0.1 is no round number
    return float(f"{rate * config[METHOD].get(RATE_FACTOR, 1.0):.6g}")


EXPERTS = tuple((METHOD, name) for name in DERIVED)
KNOBS = (
    Knob(
        GATE_INPUT,
        "where the gate looks",
        lambda c: c[METHOD].get("router_input"),
        ((METHOD, "router_input"),),
        beside=True,
    ),
    Knob("count", "number of experts", lambda c: c["experts"]["count"], (("experts", "count"), *EXPERTS)),
    Knob("top_k", "experts per token", lambda c: c["experts"]["top_k"], (("experts", "top_k"),)),
    Knob(
        "rank",
        "rank of an expert",
        lambda c: c["experts"]["rank"],
        (("experts", "rank"), ("experts", "alpha"), *EXPERTS),
    ),
    Knob(
        "balance",
        "weight of the balance loss",
        lambda c: c[METHOD].get("balance_coefficient"),
        ((METHOD, "balance_coefficient"),),
    ),
    Knob(
        BYPASS,
        "penalty of a token that is not left to the backbone alone",
        lambda c: c[METHOD].get("bypass_penalty", 0.0) if c[METHOD].get("null_expert") else None,
        ((METHOD, "null_expert"), (METHOD, "bypass_penalty")),
    ),
    Knob(
        "learning_rate",
        "learning rate",
        learning_rate,
        ((METHOD, RATE_FACTOR), ("train", "learning_rate")),
    ),
    Knob(
        "level",
        "how hard the items are",
        lambda c: entry(c, "data")["level"],
        (("data", "level"),),
    ),
    Knob(
        "train_items",
        "items of a family to learn from",
        lambda c: entry(c, "data").get("train_items"),
        (("data", "train_items"),),
    ),
)
