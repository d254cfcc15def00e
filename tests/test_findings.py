"""The sentences of the README: each number is that of the records, and what was not measured is not said."""

from pathlib import Path

import pytest

import synthetic
import synthetic_gpu
import synthetic_memory
from adafuse.records import load
from adafuse.report import scan_table
from adafuse.report.drift import drift_cells
from adafuse.report.findings import sentences
from adafuse.report.text import process_text, ratio_text
from adafuse.report.timing import latency_cells, ratio
from adafuse.report.traces import timelines, trace_cells
from adafuse.stats import Interval
from test_report_traces import write_trace


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


def test_memory_names_the_copy_that_it_leaves_out(tmp_path: Path) -> None:
    shape = synthetic_gpu.LLAMA["shape"]
    plain = {"model": synthetic_gpu.LLAMA, "experts": synthetic_gpu.experts()}
    synthetic.write_latency(tmp_path, machine=synthetic_memory.GPU, plain=plain)
    synthetic_memory.write_peaks(tmp_path, plain=plain)
    (line,) = [line for line in said(tmp_path) if "**Memory**" in line]
    linears = 4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]
    copy_gib = 2 * shape["num_hidden_layers"] * linears / 2**30
    assert "peaks at 1.062 times the backbone's 13.0 GiB" in line
    assert f"{copy_gib:.1f} GiB more, {(13.8 + copy_gib) / 13:.2f} times in all" in line


def test_memory_that_two_cells_share_is_said_once(tmp_path: Path) -> None:
    synthetic_memory.write_both(tmp_path)
    longer = {"latency": {"rounds": 8, "block_tokens": 200, "trained_adapters": False, "queries": True}}
    synthetic.write_latency(tmp_path, name="queries", machine=synthetic_memory.GPU, plain=longer)
    assert [len(cell.memory) for cell in latency_cells(load([tmp_path]))] == [5, 5]
    (line,) = [line for line in said(tmp_path) if "**Memory**" in line]
    assert "whole queries" not in line


def test_a_model_of_unknown_sizes_has_no_copy_to_name(tmp_path: Path) -> None:
    """A checkpoint in a folder says its sizes itself, and records do not."""
    synthetic_memory.write_both(tmp_path)
    (line,) = [line for line in said(tmp_path) if "**Memory**" in line]
    assert line.endswith("is on the host for that.")


def test_captured_memory_is_said_once_over_the_captured_backbone(tmp_path: Path) -> None:
    plain = {"model": synthetic_gpu.LLAMA, "experts": synthetic_gpu.experts(), "batch": 1, "context": 128}
    synthetic.write_latency(tmp_path, 0, "twin", machine=synthetic_memory.GPU, plain=plain)
    peaks = {"base_graph": 10.0, "adafuse_gather_graph": 11.0, "adafuse_switch_graph": 10.5}
    synthetic_memory.write_peaks(tmp_path, peaks, plain=plain)
    (line,) = [line for line in said(tmp_path) if "Memory without launches" in line]
    assert "times the captured backbone's 10.0 GiB: AdaFuse (gather, graph) 1.100" in line and "1.050" in line


def test_the_gpu_idles_by_the_untraced_token(tmp_path: Path) -> None:
    write_trace(tmp_path, machine=synthetic_memory.GPU)
    (line,) = [line for line in said(tmp_path) if "**Why**" in line]
    (cell,) = trace_cells(load([tmp_path]))
    base = next(own.line for own in timelines(cell) if own.arm == "base")
    busy_ms = sum(base["parts_ms"].values())
    assert f"idles for {100 * (1 - busy_ms / base['untraced_ms']):.0f} %" in line
