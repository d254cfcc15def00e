"""Sheets about the measurement itself: blocks left out and why, clocks, neighbours, and what machines can do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import synthetic
import synthetic_gpu
from adafuse.records import load
from adafuse.report import all_sheets, evidence, find, sheet, timing
from adafuse.report.cells import Cell

STATE = {"sm_mhz": 1980.0, "power_w": 420.0, "foreign_processes": 0, "throttle": []}
NODES = {
    "rmw_gbps": 3900.0,
    "launch_us": 6.5,
    "empty_node_us": 1.25,
    "tiny_node_us": 1.75,
    "graph_launch_us": 4.4,
}
GPU = {"machine": synthetic_gpu.GPU}


def cell_of(folder: Path, **changes: Any) -> Cell:
    synthetic.write_latency(folder, **changes)
    (cell,) = find(load([folder])).latency
    return cell


def timing_row(cell: Cell) -> dict[str, Any]:
    (row,) = evidence.timing([cell]).sections[0].rows
    return row


def test_a_check_says_what_it_can_tell() -> None:
    line = {"arm": "a", "check": "logits", "value": 0.1, "bound": 0.2, "passed": True}
    details = {
        "logits": "relative error; what the adapter itself moves the reference by is 0.8",
        "greedy": "of 32 greedy tokens 5 could be decided; of those, different",
        "whole": "the whole sequence",
    }
    lines = [line | {"check": check, "detail": detail} for check, detail in details.items()]
    told = [evidence._can_tell(own) for own in lines]
    assert told[0] == "what the adapter itself moves the reference by is 0.8"
    assert told[1] == "of 32 greedy tokens 5 could be decided" and told[2] == "–"


def calibration(folder: Path) -> sheet.Sheet:
    return next(table for table in all_sheets(find(load([folder]))) if table.name == "calibration")


def test_a_flagged_block_is_in_no_ratio(tmp_path: Path) -> None:
    flags = (("base", 5, "SM clock: 1700 MHz"), ("moral_loop", 0, "SM clock: 1700 MHz"))
    (with_flags,) = cell_of(tmp_path / "a", flags=flags).rounds.values()
    (without,) = cell_of(tmp_path / "b").rounds.values()
    gone = without.isna() ^ with_flags.isna()
    assert sorted(zip(*np.nonzero(gone.to_numpy()), strict=True)) == sorted(
        [(0, list(without.columns).index("moral_loop")), (5, list(without.columns).index("base"))]
    )
    # the base is excluded in round 3 and flagged in round 5
    assert with_flags["base"].isna().sum() == 2 and len(with_flags) == 8


def test_flags_belong_to_their_own_process(tmp_path: Path) -> None:
    synthetic.write_latency(tmp_path, 0, flags=(("base", 5, "SM clock: 1700 MHz"),))
    cell = cell_of(tmp_path, replicate=1)
    assert [rounds["base"].isna().sum() for rounds in cell.rounds.values()] == [2, 1]
    assert timing.ratio(cell, "moral_loop").n_rounds == 13


def test_blocks_left_out_are_counted_with_their_causes(tmp_path: Path) -> None:
    flags = (("base", 5, "SM clock: 1700 MHz"), ("moral_loop", 0, "SM clock: 1650 MHz"))
    cell = cell_of(tmp_path, flags=flags)
    row = timing_row(cell)
    assert (row["excluded"], row["flagged"]) == (1, 2)
    assert f"3 of {row['blocks']} (2 SM clock, 1 preempted)" in sheet.markdown(evidence.timing([cell]))


def test_nothing_left_out_has_no_causes(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, rounds=3)
    text = sheet.markdown(evidence.timing([cell]))
    assert f"0 of {timing_row(cell)['blocks']} " in text and "(0" not in text


def test_a_gpu_shows_clocks_power_and_neighbours(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, state=STATE, **GPU)
    row = timing_row(cell)
    assert (row["sm_mhz"], row["power_w"], row["foreign_processes"]) == (1980.0, 420.0, 0)
    columns = evidence.timing([cell]).sections[0].columns
    assert [columns[name](row) for name in ("SM MHz", "power W", "neighbours")] == ["1980", "420", "0"]


def test_an_arm_at_its_own_clock_is_named(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, state=STATE, **GPU)
    for line in cell.records[0].of("block"):
        line["state"] = STATE | ({"sm_mhz": 1755.0} if line["arm"] == "moral_loop" else {})
    for line in cell.records[0].of("block")[:1]:
        line["state"] = line["state"] | {"foreign_processes": 3}
    row = timing_row(cell)
    columns = evidence.timing([cell]).sections[0].columns
    assert columns["SM MHz"](row) == "1980 (lowest arm 1755)" and columns["neighbours"](row) == "3"


def test_older_states_leave_gaps(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, state={"load_1min": 0.5, "throttle_bits": 0.0}, **GPU)
    row, columns = timing_row(cell), evidence.timing([cell]).sections[0].columns
    assert [columns[name](row) for name in ("SM MHz", "power W", "neighbours")] == ["–", "–", "–"]


def test_a_cpu_has_no_columns_about_a_gpu(tmp_path: Path) -> None:
    cell = cell_of(tmp_path)
    assert not {"SM MHz", "power W", "neighbours"} & set(evidence.timing([cell]).sections[0].columns)


def test_calibration_has_a_section_for_each_machine_and_a_row_for_each_cell(tmp_path: Path) -> None:
    synthetic.write_latency(tmp_path)
    synthetic.write_latency(tmp_path, plain={"batch": 4})
    for replicate, node_us in enumerate((1.0, 1.5, 9.0)):
        numbers = NODES | {"empty_node_us": node_us}
        synthetic.write_latency(tmp_path, replicate, calibration=numbers, **GPU, name=f"gpu{replicate}")
    synthetic_gpu.write_kernels(tmp_path, [synthetic_gpu.kernel_line()])
    cpu, gpu = sorted(calibration(tmp_path).sections, key=lambda section: "H200" in section.heading)
    assert len(cpu.rows) == 2 and "Test CPU" in cpu.heading and "NVIDIA" not in cpu.heading
    assert "empty node µs" not in cpu.columns and cpu.columns["in place GB/s"](cpu.rows[0]) == "–"
    latency, kernel = gpu.rows
    assert (latency["processes"], latency["empty_node_us"], latency["rmw_gbps"]) == (3, 1.5, 3900.0)
    assert gpu.columns["dependent node µs"](latency) == "1.75"
    assert (kernel["task"], kernel["read_gbps"], kernel["rmw_gbps"]) == ("kernel", 4300.0, None)
    assert len(latency["records"]) == 3 and "batch 1" in latency["cell"] and "H200" not in latency["cell"]


def test_older_calibrations_leave_gaps(tmp_path: Path) -> None:
    synthetic.write_latency(tmp_path, **GPU)
    (section,) = calibration(tmp_path).sections
    shown = {name: show(section.rows[0]) for name, show in section.columns.items()}
    assert shown["read GB/s"] == "20.0" and shown["copy GB/s"] == "18.0"
    assert {shown[name] for name in ("in place GB/s", "empty node µs", "graph launch µs")} == {"–"}


def test_without_calibrations_the_sheet_says_so(tmp_path: Path) -> None:
    synthetic.write_accuracy(tmp_path, "lora")
    assert "no record was calibrated" in sheet.markdown(calibration(tmp_path))


@pytest.mark.parametrize("name", ["calibration", "timing"])
def test_committed_records_still_draw(name: str) -> None:
    reference = Path(__file__).resolve().parents[1] / "results" / "reference"
    table = next(table for table in all_sheets(find(load([reference]))) if table.name == name)
    assert table.sections and all(row["records"] for section in table.sections for row in section.rows)
