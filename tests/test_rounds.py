"""Rounds: every arm once per round, order random but seeded, an arm that breaks is reported once and left out."""

import time

from adafuse.bench.device import exclusion
from adafuse.bench.rounds import Block, run_rounds


class Arm:
    def __init__(self, log: list[str], name: str, ms: float = 0.0, broken: bool = False) -> None:
        self.log, self.name, self.ms, self.broken = log, name, ms, broken

    def enter(self) -> None:
        self.log.append(f"enter {self.name}")
        if self.broken:
            raise RuntimeError("no memory")

    def block(self) -> None:
        time.sleep(self.ms / 1e3)

    def leave(self) -> None:
        self.log.append(f"leave {self.name}")


def measure(arms: dict[str, Arm], rounds: int = 6, seed: int = 0) -> tuple[list[Block], list[str]]:
    blocks: list[Block] = []
    errors: list[str] = []
    run_rounds(
        arms,
        rounds=rounds,
        tokens=64,
        seed=seed,
        device="cpu",
        on_block=blocks.append,
        on_error=lambda name, error: errors.append(f"{name}: {error}"),
    )
    return blocks, errors


def arms(**kwargs) -> dict[str, Arm]:
    log: list[str] = []
    return {name: Arm(log, name, **kwargs.get(name, {})) for name in ("a", "b", "c")}


def test_every_round_has_every_arm_once_in_a_seeded_random_order() -> None:
    blocks, _ = measure(arms())
    orders = [[b.arm for b in blocks if b.round == r] for r in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [b.arm for b in measure(arms())[0]] == [b.arm for b in blocks]
    assert [b.position for b in blocks if b.round == 0] == [0, 1, 2]


def test_the_clock_runs_during_the_block_alone() -> None:
    blocks, _ = measure(arms(b={"ms": 20.0}), rounds=2)
    times = {b.arm: b.block_ms for b in blocks}
    assert times["b"] >= 20 and times["a"] < 10


def test_an_arm_that_breaks_is_reported_once_and_the_others_go_on() -> None:
    broken = arms(b={"broken": True})
    blocks, errors = measure(broken)
    assert errors == ["b: no memory"]
    assert {b.arm for b in blocks} == {"a", "c"} and len(blocks) == 12
    assert broken["b"].log.count("leave b") == 1, "what it had entered is given back"


def test_a_preempted_block_is_flagged_not_dropped() -> None:
    blocks, _ = measure(arms(b={"ms": 50.0}), rounds=2)
    assert all("preempted" in b.excluded for b in blocks if b.arm == "b"), (
        "a sleeping block did not have the CPU"
    )
    assert exclusion("cpu", 0.99) is None
