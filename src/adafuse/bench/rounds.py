"""Interleaved timing: every round times each arm once, in random order, so that drift hits all arms alike.

In: arms that can be entered, run and left. Out: one `block` line per arm and round, in the order measured. Entering,
settling, leaving and asking the machine for its state are outside the clock, and before all of it is one block that is
not measured. Nothing is dropped: a block that must not count carries its reason, "cause: details", or gets a flag after
the last round. No rule looks at how fast the block was:

- preempted (CPU): another process had the processor; the block timed that process too.
- throttled: heat, or the board's protection of itself, slowed the GPU. The software power cap alone does not count:
  at full load it is a property of the board and of the arm. It counts by what it does to the clock (below), or where
  the driver does not tell the clock.
- foreign process: since the run began somebody else came onto the GPU, or a neighbour took memory.
- SM clock: more than 2 % below the median of the same arm's blocks; known when all blocks are measured.

Next: device.py, which tells the states; latency.py, which has the arms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from typing import Any

from tqdm import tqdm

from adafuse.bench import device
from adafuse.records import Recorder

# Half of the time. Not stricter: on a busy machine every block loses some time, alike for all arms of a round, and
# pairing takes that out.
MIN_CPU_SHARE = 0.5
SLOWDOWNS = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
POWER_CAP = "sw_power_cap"
MAX_THROTTLED_SHARE = 0.01
CLOCK_TOLERANCE = 0.02
# Our own code and graphs, loaded late, are tens of MiB; a neighbour with any work takes more than this.
OUTSIDE_GROWTH_GIB = 1.0
# what betrays a neighbour: by how much it may grow, and what is said of more
FOREIGN = {
    "foreign_processes": (0, "{:.0f} more on the GPU than when the run began"),
    "outside_gib": (OUTSIDE_GROWTH_GIB, "{:.1f} GiB more used on the GPU than when the run began, not by us"),
}

State = Mapping[str, Any]


# of a round's number: entering makes ready and settles, what it gives is timed, leaving gives everything back
TimedArm = Callable[[int], AbstractContextManager[Callable[[], object]]]


@dataclass
class Block:
    """One timed run of one arm; `position` is its place in the round, `state` the machine's around it."""

    arm: str
    round: int
    position: int
    tokens: int
    block_ms: float
    excluded: str | None
    state: State


@dataclass(frozen=True)
class Flag:
    """A block that must not count, known only when all were measured."""

    arm: str
    round: int
    reason: str


def run_rounds(
    arms: Mapping[str, TimedArm], rounds: int, tokens: int, seed: int, where: str, record: Recorder
) -> tuple[list[Block], list[Flag]]:
    """Time every arm `rounds` times; an arm that raises is reported once and left out from then on. Flags come last."""
    order, rng = list(arms), Random(seed)
    start, blocks = device.state(where), []

    def attempt(name: str, number: int) -> tuple[float, str | None, State] | None:
        """None for an arm that breaks."""
        try:
            return _measure(arms[name], number, where, start)
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
            order.remove(name)
            return None

    with tqdm(total=rounds * len(order), desc="timed blocks", unit="block") as bar:
        for number in range(rounds):
            rng.shuffle(order)
            if number == 0:
                # One block that is nobody's, as a round that never comes: a process's first is a cold start, which took
                # 8 to 127 % more than its arm's median in 19 of 19 processes that launched eagerly.
                any(attempt(name, rounds) for name in list(order))
            for position, name in enumerate(list(order)):
                if (measured := attempt(name, number)) is not None:
                    blocks.append(Block(name, number, position, tokens, *measured))
                    record.write("block", **asdict(blocks[-1]))
                    bar.update()
    flags = clock_flags(blocks)
    for flag in flags:
        record.write("flag", **asdict(flag))
    return blocks, flags


def _measure(arm: TimedArm, number: int, where: str, start: State) -> tuple[float, str | None, State]:
    with arm(number) as block:
        before = device.state(where)
        wall, cpu = time.perf_counter(), time.process_time()
        block_ms = device.timed_ms(where, block)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        seen = device.over_block(before, device.state(where)) | {"cpu_share": round(share, 3)}
    return block_ms, exclusion(where, seen, start, block_ms), seen


def exclusion(where: str, seen: State, start: State, block_ms: float) -> str | None:
    """Why a block must not count, of what is known at once. `start` is the state when the run began; `block_ms` serves
    to express the time throttled as a share.
    """
    return preempted(where, seen) or throttled(seen, block_ms) or foreign(seen, start)


def preempted(where: str, seen: State) -> str | None:
    """The process did not have the CPU. With a GPU this tells nothing: waiting for it need not use the CPU."""
    if where == "cpu" and seen["cpu_share"] < MIN_CPU_SHARE:
        return f"preempted: the process had the CPU for {seen['cpu_share']:.0%} of the block"
    return None


def throttled(seen: State, block_ms: float) -> str | None:
    """Heat or the board's own protection slowed the GPU; the power cap only if no clock can acquit it."""
    blind = "sm_mhz" not in seen
    reasons = seen.get("throttle", [])
    named = [name for name in reasons if name in SLOWDOWNS or (blind and name == POWER_CAP)]
    if named:
        return f"throttled: {', '.join(named)}"
    for limit, ms in seen.get("throttled_ms", {}).items():
        if (limit != "power" or blind) and ms > MAX_THROTTLED_SHARE * block_ms:
            return f"throttled: {limit} limit for {ms:.1f} ms of the block"
    return None


def foreign(seen: State, start: State) -> str | None:
    """Somebody came onto the GPU. Who was there before the run is in every block alike, and in the report."""
    for name, (spare, said) in FOREIGN.items():
        grown = seen[name] - start[name] if name in seen and name in start else 0
        if grown > spare:
            return f"foreign process: {said.format(grown)}"
    return None


def clock_flags(blocks: Sequence[Block]) -> list[Flag]:
    """Of all blocks of a run, those at a lower SM clock than their arm's others.

    The median is that of the arm, not of the run: eager arms leave the GPU idle between launches and heavy ones draw
    more power, so the driver may give each its own clock, and against a common median all blocks of an arm could go.
    What this cannot see, an arm that is slow in every round, is in the report: the clocks of each runtime.
    """
    counted = [block for block in blocks if block.excluded is None and "sm_mhz" in block.state]
    usual_mhz = {
        arm: median(block.state["sm_mhz"] for block in counted if block.arm == arm)
        for arm in {block.arm for block in counted}
    }
    return [
        Flag(block.arm, block.round, _below(block.state, usual_mhz[block.arm]))
        for block in counted
        if block.state["sm_mhz"] < (1 - CLOCK_TOLERANCE) * usual_mhz[block.arm]
    ]


def _below(seen: State, usual_mhz: float) -> str:
    capped = POWER_CAP in seen.get("throttle", []) or seen.get("throttled_ms", {}).get("power", 0) > 0
    less = 1 - seen["sm_mhz"] / usual_mhz
    text = f"SM clock: {seen['sm_mhz']:.0f} MHz, {less:.1%} below the arm's median of {usual_mhz:.0f} MHz"
    return text + (", power capped" if capped else "")
