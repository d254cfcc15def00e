"""Rules that leave a block out, by heat, throttling or preemption, and the flag for a low clock, each at its edges."""

import pytest

from adafuse.bench import rounds
from adafuse.bench.rounds import Block, Flag, clock_flags, exclusion, throttled

FINE = {"sm_mhz": 1980.0, "throttle": [], "throttled_ms": {"power": 0.0, "thermal": 0.0}, "cpu_share": 0.2}


@pytest.mark.parametrize("name", ["hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown"])
def test_heat_and_hardware_exclude(name: str) -> None:
    assert throttled(FINE | {"throttle": [name]}, 100.0) == f"throttled: {name}"
    assert throttled(FINE, 100.0) is None


def test_time_under_the_thermal_limit_counts_from_one_per_cent() -> None:
    assert throttled(FINE | {"throttled_ms": {"thermal": 0.9}}, 100.0) is None
    assert "thermal limit for 1.1 ms" in throttled(FINE | {"throttled_ms": {"thermal": 1.1}}, 100.0)


def test_the_power_cap_alone_excludes_only_where_no_clock_is_known() -> None:
    capped = FINE | {"throttle": ["sw_power_cap"], "throttled_ms": {"power": 50.0}}
    assert throttled(capped, 100.0) is None
    blind = {name: value for name, value in capped.items() if name != "sm_mhz"}
    assert throttled(blind, 100.0) == "throttled: sw_power_cap"
    assert "power limit for 50.0 ms" in throttled(blind | {"throttle": []}, 100.0)


def test_preemption_is_a_rule_of_cpus() -> None:
    assert "preempted" in exclusion("cpu", {"cpu_share": 0.4}, {}, 1.0)
    assert exclusion("cpu", {"cpu_share": 0.6}, {}, 1.0) is None
    assert exclusion("cuda", FINE, {}, 1.0) is None


def block(arm: str, number: int, sm_mhz: float | None, excluded: str | None = None, **state) -> Block:
    seen = state | ({} if sm_mhz is None else {"sm_mhz": sm_mhz})
    # times that would tempt: the slow block is fine, the fast one ran at a low clock
    return Block(arm, number, 0, 64, 1e3 if sm_mhz == 1980 else 1.0, excluded, seen)


def test_a_low_clock_is_flagged_against_its_own_arm() -> None:
    graph = [block("graph", number, mhz) for number, mhz in enumerate((1980, 1980, 1930, 1980))]
    # 10 % below the graph's, in every round alike
    eager = [block("eager", number, mhz) for number, mhz in enumerate((1785, 1785, 1785, 1780))]
    (flag,) = clock_flags(graph + eager)
    assert (flag.arm, flag.round) == ("graph", 2)
    assert flag.reason == "SM clock: 1930 MHz, 2.5% below the arm's median of 1980 MHz"


def test_a_flag_says_if_the_power_cap_took_the_clock() -> None:
    blocks = [block("a", number, 1980) for number in range(3)]
    blocks.append(block("a", 3, 1700, throttle=["sw_power_cap"]))
    assert [flag.reason.endswith(", power capped") for flag in clock_flags(blocks)] == [True]


def test_blocks_that_do_not_count_set_no_median_and_get_no_flag() -> None:
    hot = [block("a", number, 1500, "throttled: hw_slowdown") for number in range(5)]
    assert clock_flags([*hot, block("a", 5, 1980), block("a", 6, 1970)]) == []
    (flag,) = clock_flags([*hot, *(block("a", n, 1980) for n in (5, 6, 7)), block("a", 8, 1500)])
    assert flag == Flag("a", 8, flag.reason)


def test_without_clocks_there_are_no_flags() -> None:
    assert clock_flags([block("a", 0, None), block("a", 1, None)]) == []
    assert clock_flags([]) == []


def test_tolerances_are_those_written_down() -> None:
    assert rounds.CLOCK_TOLERANCE == 0.02 and rounds.MAX_THROTTLED_SHARE == 0.01
