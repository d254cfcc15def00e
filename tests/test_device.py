"""The machine's state from a made-up driver, the rules that leave blocks out, and calibration."""

import os
import sys
import types
import weakref

import pytest
import torch

from adafuse.bench import calibration, device, exclusions
from adafuse.bench.exclusions import Flag, clock_flags, exclusion, foreign, throttled
from adafuse.bench.rounds import Block

GIB = 2**30
FINE = {"sm_mhz": 1980.0, "throttle": [], "throttled_ms": {"power": 0.0, "thermal": 0.0}, "cpu_share": 0.2}
BANDWIDTHS = {"read_gbps", "copy_gbps", "rmw_gbps"}
GRAPH_COSTS = {"empty_node_us", "tiny_node_us", "graph_launch_us"}


class Refused(Exception):
    """What a driver answers that does not support a call."""


class Driver(types.ModuleType):
    """pynvml with one GPU; `refused` names the calls that raise."""

    NVMLError = Refused
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.refused: set[str] = set()
        self.asked: list[str] = []
        self.bits = 0
        self.sm_mhz = 1980
        self.violation_ns = {0: 5_000_000, 1: 0}
        self.pids = [os.getpid()]
        self.used = 3 * GIB

    def __getattribute__(self, name: str):
        found = object.__getattribute__(self, name)
        if not name.startswith("nvml"):
            return found

        def call(*args):
            self.asked.append(name)
            if name in self.refused or "all" in self.refused:
                raise Refused("Not Supported")
            return found(*args)

        return call

    def nvmlInit(self):
        return None

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-made-up": "handle"}[uuid]

    def nvmlDeviceGetClockInfo(self, gpu, which):
        return {1: self.sm_mhz, 2: 3201}[which]

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 345_000

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 51

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return self.bits

    def nvmlDeviceGetViolationStatus(self, gpu, policy):
        return types.SimpleNamespace(violationTime=self.violation_ns[policy])

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in self.pids]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return types.SimpleNamespace(used=self.used)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made_up = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made_up)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="made-up")
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * GIB)
    device._nvml.cache_clear()
    yield made_up
    device._nvml.cache_clear()


def test_the_driver_s_words_become_numbers_with_units(driver: Driver) -> None:
    seen = device.state("cuda")
    assert seen.pop("load_1min") >= 0
    assert seen == {
        "sm_mhz": 1980.0,
        "memory_mhz": 3201.0,
        "power_w": 345.0,
        "temperature_c": 51.0,
        "throttle": [],
        "foreign_processes": 0,
        "outside_gib": 1.0,
        "violation_ms": {"power": 5.0, "thermal": 0.0},
    }
    device.state("cuda")
    assert driver.asked.count("nvmlInit") == driver.asked.count("nvmlDeviceGetHandleByUUID") == 1


def test_every_call_is_one_that_the_library_has(driver: Driver) -> None:
    device.state("cuda")
    calls = set(driver.asked)
    del sys.modules["pynvml"]
    import pynvml

    assert len(calls) == 9 and all(hasattr(pynvml, name) for name in calls)
    for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"):
        assert getattr(pynvml, name) == getattr(Driver, name)
    for name in ("NVML_PERF_POLICY_POWER", "NVML_PERF_POLICY_THERMAL"):
        assert getattr(pynvml, name) == getattr(Driver, name)
    library = {
        "SwPowerCap": "sw_power_cap",
        "HwSlowdown": "hw_slowdown",
        "SwThermalSlowdown": "sw_thermal_slowdown",
        "HwThermalSlowdown": "hw_thermal_slowdown",
        "HwPowerBrakeSlowdown": "hw_power_brake_slowdown",
        "DisplayClockSetting": "display_clock_setting",
    }
    for theirs, ours in library.items():
        assert device.throttle_names(getattr(pynvml, f"nvmlClocksEventReason{theirs}")) == [ours]
    for setting in ("GpuIdle", "ApplicationsClocksSetting", "SyncBoost", "None"):
        assert device.throttle_names(getattr(pynvml, f"nvmlClocksEventReason{setting}")) == []


def test_reasons_are_told_apart() -> None:
    assert device.throttle_names(0x1 | 0x4 | 0x40) == ["sw_power_cap", "hw_thermal_slowdown"]
    assert device.throttle_names(0x10000) == ["bit_0x10000"], "a later driver's reason is not lost"


@pytest.mark.parametrize(
    ("call", "lost"),
    [
        ("nvmlDeviceGetClockInfo", {"sm_mhz", "memory_mhz"}),
        ("nvmlDeviceGetViolationStatus", {"violation_ms"}),
        ("nvmlDeviceGetComputeRunningProcesses", {"foreign_processes"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {"throttle"}),
        ("nvmlInit", None),
        ("nvmlDeviceGetHandleByUUID", None),
        ("all", None),
    ],
)
def test_a_refusal_leaves_the_key_out(driver: Driver, call: str, lost: set[str] | None) -> None:
    whole = set(device.state("cuda"))
    device._nvml.cache_clear()
    driver.refused.add(call)
    seen = device.state("cuda")
    assert set(seen) == (whole - lost if lost else {"load_1min"})
    block = device.over_block(seen, seen)
    assert exclusion("cuda", block | {"cpu_share": 1.0}, seen, 100.0) is None


def test_without_the_library_there_is_the_load_alone(driver: Driver, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert set(device.state("cuda")) == {"load_1min"}


def test_a_block_s_state_is_the_worse_of_its_two_ends(driver: Driver) -> None:
    driver.bits, driver.sm_mhz = 0x4, 1800
    before = device.state("cuda")
    driver.bits, driver.sm_mhz = 0x20, 1980
    driver.pids = [os.getpid(), 7]
    driver.violation_ns = {0: 5_000_000, 1: 12_500_000}
    seen = device.over_block(before, device.state("cuda"))
    assert seen["sm_mhz"] == 1800 and seen["throttle"] == ["sw_power_cap", "sw_thermal_slowdown"]
    assert seen["throttled_ms"] == {"power": 0.0, "thermal": 12.5} and "violation_ms" not in seen
    assert seen["foreign_processes"] == 1


@pytest.mark.parametrize(
    ("pids", "count"),
    [
        ([], None),
        ([os.getpid()], 0),
        ([os.getpid(), 7, 9], 2),
        # of another namespace: one of them is us
        ([10_000_001], 0),
        ([10_000_001, 10_000_002], 1),
    ],
)
def test_foreign_processes_are_counted_in_any_namespace(driver: Driver, pids: list[int], count) -> None:
    driver.pids = pids
    assert device.state("cuda").get("foreign_processes") == count


def test_somebody_who_comes_during_the_run_excludes(driver: Driver) -> None:
    driver.pids = [os.getpid(), 7]
    start = device.state("cuda")
    assert foreign(device.state("cuda"), start) is None, "who was there before is in every block alike"
    driver.pids.append(9)
    assert "foreign process: 1 more" in foreign(device.state("cuda"), start)


def test_memory_betrays_whom_the_driver_does_not_list(driver: Driver) -> None:
    driver.pids = []
    start = device.state("cuda")
    driver.used += GIB // 2
    assert foreign(device.state("cuda"), start) is None, "our own code and graphs"
    driver.used += GIB
    assert "foreign process: 1.5 GiB more" in foreign(device.state("cuda"), start)


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
    assert exclusions.CLOCK_TOLERANCE == 0.02 and exclusions.MAX_THROTTLED_SHARE == 0.01


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)


def test_a_cpu_has_bandwidths_and_no_graphs(small_buffers: None) -> None:
    found = calibration.calibrate("cpu")
    assert set(found) == BANDWIDTHS | {"launch_us", "threads"}
    assert all(value > 0 for value in found.values())


def test_bandwidths_count_the_bytes_that_move(small_buffers: None, monkeypatch) -> None:
    def two_ms(where: str, work) -> float:
        work()
        return 2.0

    monkeypatch.setattr(device, "timed_ms", two_ms)
    found, once = calibration.calibrate("cpu"), 4 * 2**20 / 2e-3 / 1e9
    assert found["read_gbps"] == pytest.approx(once)
    assert found["copy_gbps"] == found["rmw_gbps"] == pytest.approx(2 * once)
    assert found["launch_us"] == pytest.approx(2.0), "a thousand launches in two milliseconds"


def test_each_stream_moves_what_its_name_says() -> None:
    source, target = torch.tensor([1.0, -2.0]), torch.zeros(2)
    streams = calibration._streams("cpu", source, target)
    assert streams["read"][0]().item() == -1.0
    streams["copy"][0]()
    assert target.tolist() == [1.0, -2.0] == source.tolist()
    streams["rmw"][0]()
    assert source.tolist() == [-1.0, 2.0] and target.tolist() == [1.0, -2.0]


def test_buffers_are_given_back(small_buffers: None, monkeypatch) -> None:
    made, ones = [], torch.ones

    def watched(*args, **kwargs):
        tensor = ones(*args, **kwargs)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "ones", watched)
    calibration.calibrate("cpu")
    assert len(made) == 3 and all(tensor() is None for tensor in made)


@pytest.mark.gpu
def test_a_gpu_has_every_number_and_its_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    found = calibration.calibrate("cuda")
    assert set(found) == BANDWIDTHS | GRAPH_COSTS | {"launch_us", "threads"}
    assert all(value > 0 for value in found.values()), found
    # in place moves as much as a copy, within what two kernels of the same bytes differ by
    assert 0.6 < found["rmw_gbps"] / found["copy_gbps"] < 1.7, found
    assert torch.cuda.memory_reserved() - before < 64 * 2**20


@pytest.mark.gpu
def test_a_node_that_waits_costs_no_less_than_an_empty_one() -> None:
    found = calibration.graph_costs()
    assert set(found) == GRAPH_COSTS
    assert 0 < found["empty_node_us"] < 100 and found["tiny_node_us"] >= 0.8 * found["empty_node_us"]
    assert 0 < found["graph_launch_us"] < 1000


@pytest.mark.gpu
def test_a_real_driver_answers() -> None:
    torch.zeros(1, device="cuda")
    seen = device.state("cuda")
    assert {"load_1min", "outside_gib"} <= set(seen), seen
    assert seen.get("sm_mhz", 1) > 0 and isinstance(seen.get("throttle", []), list)
