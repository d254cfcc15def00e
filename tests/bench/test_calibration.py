"""Calibration: bandwidths count the bytes that move, a GPU's graphs have their costs, and memory is given back."""

import weakref

import pytest
import torch

from adafuse.bench import calibration, device

BANDWIDTHS = {"read_gbps", "copy_gbps", "rmw_gbps"}
GRAPH_COSTS = {"empty_node_us", "tiny_node_us", "graph_launch_us"}


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
