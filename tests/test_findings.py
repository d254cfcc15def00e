"""The sentences of the README: each number is that of the records, and what was not measured is not said."""

from pathlib import Path

import pytest

import synthetic
import synthetic_gpu
from adafuse.records import load
from adafuse.report.drift import drift_cells
from adafuse.report.findings import sentences
from adafuse.report.text import process_text, ratio_text
from adafuse.report.timing import latency_cells, ratio
from adafuse.report.traces import trace_cells
from adafuse.stats import Interval


def said(folder: Path) -> list[str]:
    records = load([folder])
    return sentences(latency_cells(records), trace_cells(records), drift_cells(records))


def test_a_cpu_says_nothing_about_a_gpu(tmp_path: Path) -> None:
    synthetic.write_latency(tmp_path)
    assert said(tmp_path) == []


def test_the_fastest_other_adapter_is_looked_up(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, factors={"moral_loop": 0.1})
    (line,) = said(tmp_path)
    (cell,) = latency_cells(load([tmp_path]))
    assert (
        f"AdaFuse is {ratio_text(ratio(cell, 'moral_loop', 'adafuse_switch'))} times faster than MoRAL"
        in line
    )
    assert f"MoLA {ratio_text(ratio(cell, 'mola_loop'))}" in line and "(one process)" not in line


def test_one_process_is_said(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, processes=1)
    (line,) = said(tmp_path)
    assert line.count("(one process)") == 6, "four arms, the A/A arm, the gain"


def test_an_arm_without_a_time_is_not_among_the_fastest(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, failed=("pesc_loop",))
    (line,) = said(tmp_path)
    assert "PESC" not in line
    for folder in (tmp_path / "latency").glob("*"):
        folder.unlink()
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, failed=("adafuse_switch",))
    assert said(tmp_path) == []


@pytest.mark.parametrize("rank", [16, 64])
def test_captured_arms_are_said_with_their_floors(tmp_path: Path, rank: int) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", rank)
    (line,) = said(tmp_path)
    (cell,) = latency_cells(load([tmp_path]))
    assert f"rank {rank} on all seven linears" in line
    for arm in ("adafuse_gather_graph", "adafuse_layerwise_gather_graph", "adafuse_switch_graph"):
        assert ratio_text(ratio(cell, arm)) in line


def test_drift_names_the_error_of_each_dtype(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        synthetic_gpu.write_drift(tmp_path, dtype)
    (line,) = said(tmp_path)
    # 0.2 % and 0.025 % times the root of 1,000
    assert (
        "1,000 switches in place leave an error of 6.3 % of the weights' norm in bfloat16 and 0.79 %" in line
    )
    assert "bit-identical" in line


def test_points_of_a_scan_are_one_sentence(tmp_path: Path) -> None:
    for rank in (8, 16, 64):
        synthetic_gpu.write_gpu_latency(tmp_path, "twin", rank)
    (line,) = said(tmp_path)
    cells = latency_cells(load([tmp_path]))
    cells.sort(key=lambda cell: cell.config["experts"]["rank"])
    switched = ", ".join(f"{ratio(cell, 'adafuse_switch_graph').ratio:.2f}" for cell in cells)
    assert f"the paper's switch {switched} times the backbone" in line
    assert "r=8" in line and "r=64" in line


def test_points_of_a_scan_with_one_process_are_named(tmp_path: Path) -> None:
    for rank, processes in ((8, 3), (16, 3), (64, 1)):
        synthetic_gpu.write_gpu_latency(tmp_path, "twin", rank, processes=processes)
    (line,) = said(tmp_path)
    assert "one process at" in line and "r=64" in line.split("one process at")[1].split(";")[0]
    assert "r=8" not in line.split("one process at")[1].split(";")[0]


def test_a_ratio_that_the_twin_cannot_tell_apart_is_marked() -> None:
    found = Interval(1.69, 0.68, 4.24, 2, 6, "t over 2 processes")
    assert process_text(found, resolved=False) == "not resolved: 1.69 [0.68, 4.24]"
    assert process_text(Interval(1.02, 1.01, 1.05, 1, 3, "one process: rounds only")).endswith(
        "(one process)"
    )


def test_one_gate_is_said_under_every_strategy_or_not_at_all(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "strategies", context=64)
    (line,) = said(tmp_path)
    (cell,) = latency_cells(load([tmp_path]))
    found = ratio(cell, "adafuse_loop")
    assert f"a loop over experts {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}], gathered" in line
    for folder in (tmp_path / "latency").glob("*"):
        folder.unlink()
    synthetic_gpu.write_gpu_latency(tmp_path, "strategies", context=64, failed=("adafuse_dense",))
    assert said(tmp_path) == []
