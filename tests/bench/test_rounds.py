"""Rounds: every arm once per round, order random but seeded, an arm that breaks is reported once and left out, a block
that must not count is kept and marked.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adafuse import records
from adafuse.bench import device, rounds
from adafuse.bench.rounds import Block, Flag, run_rounds


class Arm:
    def __init__(self, log: list[str], name: str, ms: float = 0.0, broken: bool = False) -> None:
        self.log, self.name, self.ms, self.broken = log, name, ms, broken

    @contextmanager
    def __call__(self, number: int) -> Iterator[Callable[[], object]]:
        self.log.append(f"enter {self.name} {number}")
        try:
            if self.broken:
                raise RuntimeError("no memory")
            yield lambda: time.sleep(self.ms / 1e3)
        finally:
            self.log.append(f"leave {self.name}")


class Lines:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.flags: list[Flag] = []
        self.errors: list[str] = []

    def write(self, kind: str, **fields: Any) -> None:
        if kind == "block":
            self.blocks.append(Block(**fields))
        else:
            self.flags.append(Flag(**fields))

    def fail(self, where: str, error: Exception) -> None:
        self.errors.append(f"{where}: {error}")


def measure(
    arms: dict[str, Arm], rounds: int = 6, seed: int = 0
) -> tuple[list[Block], list[str], list[Flag]]:
    lines = Lines()
    run_rounds(arms, rounds, tokens=64, seed=seed, where="cpu", record=lines)
    return lines.blocks, lines.errors, lines.flags


def arms(**kwargs) -> dict[str, Arm]:
    log: list[str] = []
    return {name: Arm(log, name, **kwargs.get(name, {})) for name in ("a", "b", "c")}


def test_every_round_has_every_arm_once_in_a_seeded_random_order() -> None:
    blocks, *_ = measure(arms())
    orders = [[b.arm for b in blocks if b.round == r] for r in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [b.arm for b in measure(arms())[0]] == [b.arm for b in blocks]
    assert [b.position for b in blocks if b.round == 0] == [0, 1, 2]


def test_one_block_is_run_before_the_first_and_is_nobodys() -> None:
    """Of the arm that is first, as a round of its own."""
    made = arms()
    blocks, *_ = measure(made, rounds=2)
    first = blocks[0].arm
    assert made["a"].log[:4] == [f"enter {first} 2", f"leave {first}", f"enter {first} 0", f"leave {first}"]
    assert len(blocks) == 6 and sum(line.startswith("enter") for line in made["a"].log) == 7


def test_an_arm_that_breaks_at_once_does_not_spare_the_next_a_cold_start() -> None:
    broken = arms(**{name: {"broken": name != "b"} for name in "abc"})
    blocks, errors, _ = measure(broken, rounds=2)
    assert sorted(errors) == ["arm a: no memory", "arm c: no memory"] and [block.arm for block in blocks] == [
        "b",
        "b",
    ]
    entered = [line for line in broken["b"].log if line.startswith("enter b")]
    assert entered == ["enter b 2", "enter b 0", "enter b 1"]


def test_the_clock_runs_during_the_block_alone() -> None:
    blocks, *_ = measure(arms(b={"ms": 20.0}), rounds=2)
    times = {b.arm: b.block_ms for b in blocks}
    assert times["b"] >= 20 and times["a"] < 10


def test_an_arm_that_breaks_is_reported_once_and_the_others_go_on() -> None:
    broken = arms(b={"broken": True})
    blocks, errors, _ = measure(broken)
    assert errors == ["arm b: no memory"]
    assert {b.arm for b in blocks} == {"a", "c"} and len(blocks) == 12
    assert broken["b"].log.count("leave b") == 1, "what it had entered is given back"


def test_a_preempted_block_is_flagged_not_dropped() -> None:
    blocks, *_ = measure(arms(b={"ms": 50.0}), rounds=2)
    assert all("preempted" in b.excluded for b in blocks if b.arm == "b"), (
        "a sleeping block did not have the CPU"
    )
    assert len(blocks) == 6 and all(b.state["cpu_share"] < 0.5 for b in blocks if b.arm == "b")


def test_another_seed_gives_another_order() -> None:
    orders = {tuple(b.arm for b in measure(arms(), seed=seed)[0]) for seed in range(4)}
    assert len(orders) > 1


@pytest.fixture
def gpu_states(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The samples that a made-up GPU gives, one after the other, the last one for ever."""
    samples: list[dict] = [{"sm_mhz": 1980.0, "foreign_processes": 0}]
    monkeypatch.setattr(
        device, "state", lambda where: dict(samples.pop(0) if len(samples) > 1 else samples[0])
    )
    monkeypatch.setattr(rounds, "preempted", lambda where, seen: None)
    return samples


def test_a_low_clock_is_flagged_after_the_last_round_and_kept(gpu_states: list[dict]) -> None:
    usual = gpu_states[0]
    # before the run, then before and after each block, the first of which is nobody's
    gpu_states[:] = [*[usual] * 6, usual | {"sm_mhz": 1900.0}, usual]
    blocks, _, flags = measure({"a": arms()["a"]})
    assert len(blocks) == 6 and all(b.excluded is None for b in blocks)
    assert [(flag.arm, flag.round) for flag in flags] == [("a", 1)] and flags[0].reason.startswith("SM clock")
    assert blocks[1].state["sm_mhz"] == 1900


def test_a_neighbour_who_comes_excludes_from_then_on(gpu_states: list[dict]) -> None:
    usual = gpu_states[0]
    gpu_states[:] = [*[usual] * 5, usual | {"foreign_processes": 1}]
    blocks, _, flags = measure({"a": arms()["a"]}, rounds=3)
    assert [b.excluded is None for b in blocks] == [True, False, False] and not flags
    assert blocks[1].excluded.startswith("foreign process")


def test_the_machine_is_asked_outside_the_clock(gpu_states: list[dict], monkeypatch) -> None:
    def slow(where: str) -> dict:
        time.sleep(0.03)
        return {}

    monkeypatch.setattr(device, "state", slow)
    blocks, *_ = measure(arms(), rounds=1)
    assert all(b.block_ms < 15 for b in blocks)


def test_blocks_and_flags_are_record_lines(gpu_states: list[dict], tmp_path: Path) -> None:
    usual = gpu_states[0]
    gpu_states[:] = [usual, usual, usual, usual | {"sm_mhz": 1000.0}, usual]
    run = {"task": "latency", "cell_id": "c", "config_hash": "0", "config": {}, "machine": {}}
    with records.open_record(tmp_path / "cell.jsonl", run) as record:
        run_rounds({"a": arms()["a"]}, rounds=6, tokens=64, seed=0, where="cpu", record=record)
    read = records.read(tmp_path / "cell.jsonl")
    assert len(read.of("block")) == 6
    assert [(line["arm"], line["round"]) for line in read.of("flag")] == [("a", 0)]
