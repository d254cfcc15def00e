"""What a cell leaves out, said on the screen: arms that failed a check, and blocks that must not count.

In: the checks of an arm, the blocks and flags of all rounds. Out: lines, and whether anything is left. The same stands
in the record; whoever ran the cell should not have to look there. Next: report/latency.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from adafuse.bench.checks import Check
from adafuse.bench.rounds import Block, Flag


def say_dropped(arm: str, checks: Sequence[Check]) -> None:
    """One line if `arm` failed a check: the first of them, with its numbers."""
    failed = [check for check in checks if not check.passed]
    if failed:
        first, more = failed[0], f" (and {len(failed) - 1} more checks)" if len(failed) > 1 else ""
        said = (
            first.detail
            if first.check == "runs"
            else f"{first.value:.3g} exceeds {first.bound:.3g}, {first.detail}"
        )
        print(f"arm {arm} is dropped: check {first.check}: {said}{more}")


def say_set_aside(blocks: Sequence[Block], flags: Sequence[Flag]) -> int:
    """A line for each arm and cause; how many blocks count."""
    reasons = {(block.arm, block.round): block.excluded for block in blocks if block.excluded}
    reasons |= {(flag.arm, flag.round): flag.reason for flag in flags}
    of_arm = Counter(block.arm for block in blocks)
    for (arm, cause), count in Counter(
        (arm, why.partition(":")[0]) for (arm, _), why in reasons.items()
    ).items():
        example = next(why for (own, _), why in reasons.items() if own == arm and why.startswith(cause))
        print(f"arm {arm}: {count} of {of_arm[arm]} blocks are set aside ({example})")
    return len(blocks) - len(reasons)
