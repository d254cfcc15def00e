"""Goals: the right cell and arm answer each, met or missed at the edge, and nothing is met that was not measured."""

import pytest

import synthetic
import synthetic_gpu
from adafuse.records import load
from adafuse.report import find, goals, sheet
from adafuse.report.goals import GOALS, CostGoal, KernelGoal
from adafuse.report.goals_measured import Measured
from adafuse.stats import Interval
from synthetic_gpu import LLAMA, experts, kernel_line, write_gpu_latency, write_kernels

BANDWIDTH = "plain backbone, batch 1: share of read bandwidth"
GATHER = "AdaFuse (gather), rank 16, batch 1"
SHARE = "switch kernel, every shape: share of copy bandwidth"
ALONE = "switch kernel alone, rank 16"
GAIN = "eager: fastest other adapter over AdaFuse (switch)"


def rows(folder, section: int = 0) -> dict[str, dict]:
    found = find(load([folder]))
    table = goals.sheet(found.latency, found.kernels)
    return {row["goal"]: row for row in table.sections[section].rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict]:
    return rows(synthetic_gpu.write_gpu(tmp_path_factory.mktemp("records")))


def test_every_goal_is_answered_with_its_records(whole):
    assert list(whole) == [goal.text for goal in GOALS] and len(GOALS) == 11
    assert all(row["value"] is not None and row["records"] for row in whole.values())
    assert [name for name, row in whole.items() if row["verdict"].startswith("missed")] == [
        BANDWIDTH,
        GATHER,
        GAIN,
    ]


def test_the_backbone_is_held_against_the_bandwidth_by_runtime(whole):
    row = whole[BANDWIDTH]
    assert row["measured"].startswith("base_graph: 29 %; base_gemv_graph: 31 %; base_compiled: 37 %")
    assert row["value"] == pytest.approx(0.368, rel=0.01), "the better runtime, without our own product"


def test_the_better_runtime_counts_and_both_are_shown(whole):
    gather = whole[GATHER]
    assert gather["value"] == pytest.approx(1.08, rel=0.01)
    assert "graph: 1.08" in gather["measured"] and "compiled: 1.20" in gather["measured"]
    assert "compiled: not run" in whole["AdaFuse (gather), rank 16, batch 8"]["measured"]
    assert "to the backbone through our GEMV: 1.07" in whole["AdaFuse (fused), rank 16, batch 1"]["measured"]


def test_each_goal_reads_the_cell_of_its_rank_and_batch(whole):
    for goal in GOALS:
        if isinstance(goal, CostGoal):
            files = whole[goal.text]["records"]
            assert all(f"rank{goal.rank}-" in file and f"-b{goal.batch}-" in file for file in files), files


def test_the_fastest_other_adapter_counts(whole):
    gain = whole[GAIN]
    assert gain["value"] == pytest.approx(4.9 / 2.7, rel=0.02)
    assert gain["verdict"] == "missed by 0.58" and "mola_loop: 4.4" in gain["measured"]


def test_the_worst_line_counts(whole):
    assert whole[SHARE]["value"] == pytest.approx(6.2 / 7.0) and "qwen2_5_7b" in whole[SHARE]["measured"]
    assert whole[ALONE]["value"] == 6.9 and whole[ALONE]["ours"] == "6.90 ms"


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1.10, 1.09, 1.099, "met"),
        (1.05, 1.04, 1.11, "met, but the interval holds the bound"),
        (1.15, 1.09, 1.20, "missed by 0.05, but the interval holds the bound"),
        (1.15, 1.14, 1.16, "missed by 0.05"),
        (1.15, float("nan"), float("nan"), "missed by 0.05"),
    ],
)
def test_verdicts_at_the_bound(value, low, high, verdict):
    interval = Interval(value, low, high, 3, 60, "t over 3 processes")
    goal = CostGoal("adafuse_gather", GATHER, 16, 1, 1.10)
    assert goals._verdict(goal, Measured(value, interval, "")) == verdict


def test_at_least_is_the_mirror_image():
    share = next(goal for goal in GOALS if isinstance(goal, KernelGoal) and goal.unit == "%")
    assert goals._verdict(share, Measured(0.86, None, "")) == "met"
    assert goals._verdict(share, Measured(0.83, None, "")) == "missed by 2 points"
    assert goals._verdict(share, Measured(None, None, "")) == "not measured"


def test_a_failed_check_misses_the_goal(tmp_path):
    write_kernels(tmp_path, [kernel_line(), kernel_line(ms=None, targets="qv")])
    found = rows(tmp_path)
    assert found[SHARE]["verdict"] == "missed: a line has no time"
    assert "check failed: 0.5, bound 0.01" in found[SHARE]["measured"]
    assert found[ALONE]["verdict"] == "met"


def test_a_kernel_that_raised_is_no_met_goal(tmp_path):
    write_kernels(tmp_path, [kernel_line()], failed=["kernel Case(kernel='switch', targets='qv')"])
    found = rows(tmp_path)
    assert (
        found[SHARE]["verdict"] == "missed: a line has no time"
        and "out of memory" in found[SHARE]["measured"]
    )


@pytest.mark.parametrize(
    "plain",
    [
        {"model": LLAMA | {"shape": LLAMA["shape"] | {"num_hidden_layers": 2}}},
        {"model": LLAMA | {"dtype": "float16"}},
        {"model": LLAMA | {"path": "/some/folder"}},
        {"experts": experts() | {"targets": ["q_proj", "v_proj"]}},
        {"experts": experts() | {"top_k": 1}},
        {"context": 64},
        {"batch": 2},
    ],
    ids=["two blocks", "float16", "a folder", "two linears", "top-1", "context", "batch"],
)
def test_another_shape_answers_no_goal(tmp_path, plain):
    write_gpu_latency(tmp_path, "graph", processes=1, plain=plain)
    assert {row["verdict"] for row in rows(tmp_path).values()} == {"not measured"}


def test_the_reason_of_an_arm_without_a_time_is_shown(tmp_path):
    write_gpu_latency(tmp_path, "graph", processes=1, failed=("adafuse_gather_graph",))
    found = rows(tmp_path)[GATHER]
    assert found["verdict"] == "not measured" and "graph: check failed: logits" in found["measured"]


def test_one_process_says_so(tmp_path):
    write_gpu_latency(tmp_path, "graph", processes=1)
    assert "one process: rounds only" in rows(tmp_path)[GATHER]["measured"]


def test_a_cpu_has_no_goals(tmp_path):
    synthetic.write_latency(tmp_path, plain={"model": LLAMA, "experts": experts(), "context": 128})
    found = find(load([tmp_path]))
    text = sheet.markdown(goals.sheet(found.latency, found.kernels))
    assert not goals.gpus(found.latency, found.kernels)
    assert "not run in this profile (the goals are about a GPU): experiment=graph" in text


def test_two_gpus_are_two_sections(tmp_path):
    write_kernels(tmp_path, [kernel_line()])
    other = synthetic_gpu.GPU | {"gpu": "NVIDIA H100"}
    write_kernels(tmp_path, [kernel_line(ms=9.0)], "other", machine=other)
    assert rows(tmp_path, 0)[SHARE]["verdict"].startswith("missed")
    assert rows(tmp_path, 1)[SHARE]["verdict"] == "met"
