"""Which blocks must not count, and why: every rule in one place, and none looks at how fast the block was.

In: states as device.py gives them. Out: a reason, "cause: details", or None. A block that must not count stays in the
record with its reason. Most rules are decided at once (`excluded` of the block), the one about clocks when all blocks
are measured (a `flag` line). Next: rounds.py.

- preempted (CPU): another process had the processor; the block timed that process too.
- throttled: heat, or the board's protection of itself, slowed the GPU. The software power cap alone does not count:
  at full load it is a property of the board and of the arm. It counts by what it does to the clock (below), or where
  the driver does not tell the clock.
- foreign process: since the run began somebody else came onto the GPU, or a neighbour took memory.
- SM clock: more than 2 % below the median of the same arm's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafuse.bench.rounds import Block

# Half of the time. Not stricter: on a busy machine every block loses some time, alike for all arms of a round, and
# pairing takes that out.
MIN_CPU_SHARE = 0.5
SLOWDOWNS = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
POWER_CAP = "sw_power_cap"
MAX_THROTTLED_SHARE = 0.01
CLOCK_TOLERANCE = 0.02
# Our own code and graphs, loaded late, are tens of MiB; a neighbour with any work takes more than this.
OUTSIDE_GROWTH_GIB = 1.0

State = Mapping[str, Any]


@dataclass(frozen=True)
class Flag:
    """A block that must not count, known only when all were measured."""

    arm: str
    round: int
    reason: str


def exclusion(device: str, seen: State, start: State, block_ms: float) -> str | None:
    """Why a block must not count, of what is known at once. `start` is the state when the run began; `block_ms` serves
    to express the time throttled as a share.
    """
    return preempted(device, seen) or throttled(seen, block_ms) or foreign(seen, start)


def preempted(device: str, seen: State) -> str | None:
    """The process did not have the CPU. With a GPU this tells nothing: waiting for it need not use the CPU."""
    if device == "cpu" and seen["cpu_share"] < MIN_CPU_SHARE:
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
    for name, spare, said in (
        ("foreign_processes", 0, "{:.0f} more on the GPU than when the run began"),
        (
            "outside_gib",
            OUTSIDE_GROWTH_GIB,
            "{:.1f} GiB more in use on the GPU than when the run began, not by us",
        ),
    ):
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
