"""The machine's state from a made-up driver, and neighbours who show in it."""

import os
import sys
import types

import pytest
import torch

from adafuse.bench import device
from adafuse.bench.rounds import exclusion, foreign
from adafuse.machine import nvml_handle

GIB = 2**30


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
    nvml_handle.cache_clear()
    yield made_up
    nvml_handle.cache_clear()


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
    nvml_handle.cache_clear()
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


@pytest.mark.gpu
def test_a_real_driver_answers() -> None:
    torch.zeros(1, device="cuda")
    seen = device.state("cuda")
    assert {"load_1min", "outside_gib"} <= set(seen), seen
    assert seen.get("sm_mhz", 1) > 0 and isinstance(seen.get("throttle", []), list)
