"""The sentences of the README: each number is that of the records, and what was not measured is not said."""

from pathlib import Path

import pytest

import synthetic
import synthetic_gpu
from adafuse.records import load
from adafuse.report import scan_table
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


def test_points_of_a_scan_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    for rank in (8, 16, 64):
        synthetic_gpu.write_gpu_latency(tmp_path, "twin", rank, processes=1 if rank == 64 else 3)
    assert said(tmp_path) == []
    cells = latency_cells(load([tmp_path]))
    (section,) = scan_table.sheet(cells).sections
    shown = [{name: show(row) for name, show in section.columns.items()} for row in section.rows]
    assert [row["adapted linears, rank, experts"].split()[1] for row in shown] == ["r=8", "r=16", "r=64"]
    assert [row["processes"] for row in shown] == ["3", "3", "1"]
    first = min(cells, key=lambda cell: cell.config["experts"]["rank"])
    assert shown[0]["AdaFuse (switch, graph)"] == ratio_text(ratio(first, "adafuse_switch_graph"))
    gate = ratio(first, "adafuse_layerwise_gather_graph", "adafuse_gather_graph")
    assert shown[0]["per layer / one gate"] == ratio_text(gate)
    assert not any(name.startswith("Backbone (again") for name in section.columns)


def test_the_sizes_of_the_adapters_are_said(tmp_path: Path) -> None:
    methods = {name: {"expert_targets": None} for name in ("mola", "pesc", "adafuse")}
    plain = {"methods": methods | {"moral": {"expert_targets": ["up_proj"]}}}
    plain["experts"] = synthetic_gpu.experts() | {"targets": ["q_proj", "v_proj"]}
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, plain=plain)
    (line,) = said(tmp_path)
    assert "Parameters of the adapters: AdaFuse (switch) " in line
    assert line.endswith("; not on the cell's linears but on those of its own paper: MoRAL.")


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
