"""Interleaved timing: every round times each arm once, in random order, so that drift hits all arms alike.

In: arms that can be entered, run and left. Out: one block line per arm and round, in the order measured. Entering,
settling, leaving and asking the machine for its state are outside the clock, and before all of it is one block that is
not measured. Nothing is dropped: a block that must not count (exclusions.py) carries its reason, or gets a flag after
the last round. Next: latency.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from tqdm import tqdm

from adafuse.bench import device as machine
from adafuse.bench import exclusions
from adafuse.bench.exclusions import Flag


class TimedArm(Protocol):
    """`enter` makes ready for this round and settles, `block` is timed, `leave` gives everything back."""

    def enter(self, number: int) -> None: ...
    def block(self) -> None: ...
    def leave(self) -> None: ...


@dataclass
class Block:
    """One timed run of one arm; `position` is its place in the round, `state` the machine's around it."""

    arm: str
    round: int
    position: int
    tokens: int
    block_ms: float
    excluded: str | None
    state: dict[str, Any]


def run_rounds(
    arms: Mapping[str, TimedArm],
    rounds: int,
    tokens: int,
    seed: int,
    device: str,
    on_block: Callable[[Block], None],
    on_error: Callable[[str, Exception], None],
    on_flag: Callable[[Flag], None],
) -> None:
    """Time every arm `rounds` times; an arm that raises is reported once and left out from then on. Flags come last."""
    order, rng = list(arms), Random(seed)
    start, blocks = machine.state(device), []
    with tqdm(total=rounds * len(order), desc="timed blocks", unit="block") as bar:
        for number in range(rounds):
            rng.shuffle(order)
            if number == 0:
                _warm(arms, order, rounds, device, on_error)
            for position, name in enumerate(list(order)):
                try:
                    measured = _measure(arms[name], number, device, start)
                except Exception as error:  # an arm's failure is a record; the other arms go on
                    on_error(name, error)
                    order.remove(name)
                    continue
                blocks.append(Block(name, number, position, tokens, *measured))
                on_block(blocks[-1])
                bar.update()
    for flag in exclusions.clock_flags(blocks):
        on_flag(flag)


def _warm(
    arms: Mapping[str, TimedArm],
    order: list[str],
    number: int,
    device: str,
    on_error: Callable[[str, Exception], None],
) -> None:
    """One block of the first arm in `order` that does not break, as a round that never comes: a process's first block
    is a cold start, which took 8 to 127 % more than its arm's median in 19 of 19 processes that launched eagerly.
    """
    for name in list(order):
        try:
            with _entered(arms[name], number):
                machine.timed_ms(device, arms[name].block)
            return
        except Exception as error:  # an arm's failure is a record; the other arms go on
            on_error(name, error)
            order.remove(name)


def _measure(
    arm: TimedArm, number: int, device: str, start: dict[str, Any]
) -> tuple[float, str | None, dict[str, Any]]:
    with _entered(arm, number):
        before = machine.state(device)
        wall, cpu = time.perf_counter(), time.process_time()
        block_ms = machine.timed_ms(device, arm.block)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        seen = machine.over_block(before, machine.state(device)) | {"cpu_share": round(share, 3)}
    return block_ms, exclusions.exclusion(device, seen, start, block_ms), seen


@contextmanager
def _entered(arm: TimedArm, number: int) -> Iterator[None]:
    """Left again, also where entering broke off half way."""
    try:
        arm.enter(number)
        yield
    finally:
        arm.leave()
