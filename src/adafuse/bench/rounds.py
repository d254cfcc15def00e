"""Interleaved timing: every round times each arm once, in random order, so that drift hits all arms alike.

In: arms that can be entered, run and left. Out: one block line per arm and round, in the order measured. Entering,
settling and leaving are outside the clock. Nothing is dropped: a block that must not count carries its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from tqdm import tqdm

from adafuse.bench import device as machine


class TimedArm(Protocol):
    """`enter` makes ready and settles, `block` is timed, `leave` gives everything back."""

    def enter(self) -> None: ...
    def block(self) -> None: ...
    def leave(self) -> None: ...


@dataclass
class Block:
    """One timed run of one arm; `position` is its place in the round."""

    arm: str
    round: int
    position: int
    tokens: int
    block_ms: float
    excluded: str | None
    state: dict[str, float]


def run_rounds(
    arms: Mapping[str, TimedArm],
    rounds: int,
    tokens: int,
    seed: int,
    device: str,
    on_block: Callable[[Block], None],
    on_error: Callable[[str, Exception], None],
) -> None:
    """Time every arm `rounds` times; an arm that raises is reported once and left out from then on."""
    order, rng = list(arms), Random(seed)
    with tqdm(total=rounds * len(order), desc="timed blocks", unit="block") as bar:
        for number in range(rounds):
            rng.shuffle(order)
            for position, name in enumerate(list(order)):
                try:
                    measured = _measure(arms[name], device)
                except Exception as error:  # an arm's failure is a record; the other arms go on
                    on_error(name, error)
                    order.remove(name)
                    continue
                on_block(Block(name, number, position, tokens, *measured))
                bar.update()


def _measure(arm: TimedArm, device: str) -> tuple[float, str | None, dict[str, float]]:
    try:
        arm.enter()
        wall, cpu = time.perf_counter(), time.process_time()
        block_ms = machine.timed_ms(device, arm.block)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        seen: dict[str, Any] = machine.state(device) | {"cpu_share": round(share, 3)}
    finally:
        arm.leave()
    return block_ms, machine.exclusion(device, share), seen
