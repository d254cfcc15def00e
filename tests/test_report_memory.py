"""Memory in the report: joined to the latency cell of its workload, shown beside the paper's, judged by the rule."""

from pathlib import Path

import pytest

import synthetic
import synthetic_memory
from adafuse import records
from adafuse.records import load
from adafuse.report import find, timing
from adafuse.report.verdicts import NOT_REPLICATED, NOT_TESTABLE, REPLICATED
from synthetic import config as plain_config
from synthetic import write_latency
from synthetic_memory import GPU, PEAKS, write_both, write_failed_memory, write_memory, write_peaks
from test_claims import by_text, find_claim
from test_tables import row, sheets, shown


def memory_of(folder: Path, arm: str) -> dict:
    (cell,) = find(load([folder])).latency
    return timing.results(cell, [arm])[arm].memory


def test_memory_joins_the_cell_of_its_workload(tmp_path: Path) -> None:
    write_both(tmp_path)
    (cell,) = find(load([tmp_path])).latency
    assert cell.records[0].run["task"] == "latency" and len(cell.memory) == len(PEAKS)
    result = timing.results(cell)["mola_loop"]
    assert result.memory["peak_gib"] == PEAKS["mola_loop"]
    assert result.files == ["latency/paper-tiny-b1-r0.jsonl", "memory/mola_loop-b1-t64.jsonl"]
    other = timing.results(cell)["moral_simple_merge"]
    assert other.memory["peak_gib"] is None and other.memory["weights_gib"] == 0.006, (
        "counted by the latency record"
    )
    assert other.memory["note"] == "not measured: task=memory arms.run=[moral_simple_merge]"


@pytest.mark.parametrize(
    "other",
    [
        {"plain": {"batch": 8}},
        {"plain": {"context": 128}},
        {"plain": {"experts": {"rank": 64, "targets": [], "count": 8, "top_k": 2}}},
        {"plain": {"model": {"name": "small", "dtype": "float32"}}},
        {"plain": {"methods": plain_config()["methods"] | {"base": {"name": "base", "routing": "token"}}}},
        {"machine": GPU | {"cpu": "Another CPU"}},
    ],
    ids=["batch", "context", "experts", "model", "method", "machine"],
)
def test_memory_of_something_else_stays_apart(tmp_path: Path, other: dict) -> None:
    write_latency(tmp_path, machine=GPU)
    write_memory(tmp_path, "base", 13.0, **other)
    timed, alone = find(load([tmp_path])).latency
    assert timed.memory == () and len(alone.memory) == 1
    assert timing.results(timed, ["base"])["base"].memory["note"] == "not measured: experiment=table5"


def test_memory_from_before_a_setting_joins_where_the_setting_is_not_used(tmp_path: Path) -> None:
    own = plain_config()["methods"]
    since = {
        name: method | {"null_expert": False, "learning_rate_factor": 3.0} for name, method in own.items()
    }
    write_latency(tmp_path / "now", machine=GPU, plain={"methods": since})
    write_memory(tmp_path / "before", "mola_loop", 14.0)
    assert memory_of(tmp_path, "mola_loop")["peak_gib"] == 14.0
    used = {name: method | {"null_expert": True} for name, method in own.items()}
    write_latency(tmp_path / "now", machine=GPU, plain={"methods": used})
    timed, alone = find(load([tmp_path])).latency
    assert timed.memory == () and len(alone.memory) == 1


def test_the_same_length_of_decode_is_preferred(tmp_path: Path) -> None:
    write_latency(tmp_path, machine=GPU)
    longer = {"latency": {"rounds": 8, "block_tokens": 200, "trained_adapters": False}}
    write_memory(tmp_path, "base", 14.0, plain=longer)
    assert memory_of(tmp_path, "base")["peak_gib"] == 14.0
    write_memory(tmp_path, "base", 13.0)
    (timed, alone) = find(load([tmp_path])).latency
    assert timing.results(timed, ["base"])["base"].memory["peak_gib"] == 13.0 and len(alone.memory) == 1


def test_of_several_processes_the_largest_peak_counts(tmp_path: Path) -> None:
    write_latency(tmp_path, machine=GPU)
    for number, peak_gib in enumerate((13.0, 13.2, 13.1)):
        write_memory(tmp_path / str(number), "base", peak_gib, seed=number)
    assert memory_of(tmp_path, "base")["peak_gib"] == 13.2


def test_why_there_is_no_peak(tmp_path: Path) -> None:
    write_latency(tmp_path, machine=GPU)
    write_failed_memory(tmp_path, "mola_loop")
    done = write_memory(tmp_path, "pesc_loop", 13.0)
    records.partial_path(done).write_bytes(done.read_bytes()[:-200])
    done.unlink()
    assert memory_of(tmp_path, "mola_loop")["note"] == (
        "error: MemoryError: mola_loop does not fit a device of 80.0 GiB"
    )
    assert "unfinished" in memory_of(tmp_path, "pesc_loop")["note"]


def test_memory_alone_makes_a_cell(tmp_path: Path) -> None:
    write_peaks(tmp_path)
    (cell,) = find(load([tmp_path])).latency
    assert timing.missing(cell, "base") == "no latency record of this cell"
    assert timing.cells_for([cell], list(PEAKS)) == []


def test_measured_memory_stands_beside_the_paper(tmp_path):
    synthetic_memory.write_both(tmp_path)
    table = sheets(tmp_path)["table5"]
    mola = row(table, "arm", "mola_loop")
    assert (mola["peak_gib"], mola["peak_load_gib"], mola["process_gib"]) == (14.0, 16.0, 15.0)
    assert mola["records"][-1] == "memory/mola_loop-b1-t64.jsonl" and mola["ratio"] is not None
    line = next(line for line in shown(table).splitlines() if line.startswith("| MoLA"))
    assert "14.0 (+7.7 %)" in line and "26.3 (+104 %)" in line and "12.6" in line


def test_an_arm_beside_the_papers_shows_its_memory(tmp_path):
    synthetic_memory.write_both(tmp_path)
    synthetic_memory.write_memory(tmp_path, "adafuse_gather", 13.4)
    gather = row(sheets(tmp_path)["table5"], "arm", "adafuse_gather")
    assert gather["peak_gib"] == 13.4 and gather["paper_ratio"] is None and "not run" in gather["reason"]
    assert "adafuse_gather" not in [r["arm"] for r in sheets(tmp_path)["table1"].sections[0].rows]


def test_captured_memory_is_over_the_captured_backbone(tmp_path):
    synthetic.write_latency(tmp_path, arms="graph", machine=synthetic_memory.GPU)
    synthetic_memory.write_peaks(tmp_path, {"base_graph": 20.0, "adafuse_switch_graph": 30.0, "base": 10.0})
    text = shown(sheets(tmp_path)["attribution"])
    assert "30.0 (+50 %)" in text
    plain = shown(sheets(tmp_path)["table5"])
    assert "not run in this profile: experiment=table5" in plain


def test_memory_without_a_latency_cell_is_shown(tmp_path):
    synthetic_memory.write_peaks(tmp_path)
    found = sheets(tmp_path)
    (section,) = found["table5"].sections
    assert section.heading.endswith("batch 1 · context 64 · memory only")
    assert [r["peak_gib"] for r in section.rows] == list(synthetic_memory.PEAKS.values())
    assert "no latency record of this cell" in shown(found["table5"])
    for name in ("table1", "table6", "attribution"):
        assert "not run in this profile" in shown(found[name]), name


def test_captured_memory_without_a_latency_cell_is_no_attribution(tmp_path):
    synthetic_memory.write_peaks(tmp_path, {"base_graph": 20.0, "adafuse_gather_graph": 22.0})
    found = sheets(tmp_path)
    assert "not run in this profile" in shown(found["attribution"])
    assert "22.0 (+10 %)" in shown(found["table5"])


def test_a_cpu_shows_what_its_process_held(tmp_path):
    synthetic.write_latency(tmp_path)
    synthetic_memory.write_memory(tmp_path, "base", None)
    base = row(sheets(tmp_path)["table5"], "arm", "base")
    assert base["peak_gib"] is None and base["process_gib"] == 0.4
    line = next(line for line in shown(sheets(tmp_path)["table5"]).splitlines() if "| Backbone" in line)
    assert "| no peak without a CUDA device " in line and "0.400" in line


def test_memory_on_a_gpu_is_judged(tmp_path):
    """AdaFuse's memory is a bound; the others' are numbers, and to need less than printed is not to replicate them."""
    write_both(tmp_path)
    claims = by_text(tmp_path)
    for name, printed, verdict in (
        ("AdaFuse", "≤ 1.07 (+7 %)", REPLICATED),
        ("MoLA", "2.04 (+104 %)", NOT_REPLICATED),
        ("PESC", "1.02 (+1.6 %)", REPLICATED),
        ("MoRAL", "1.03 (+3.1 %)", NOT_REPLICATED),
    ):
        claim = find_claim(claims, "peak memory", name)
        assert (claim.verdict, claim.printed) == (verdict, printed), name
        assert "one process each" in claim.why and any("memory/base" in file for file in claim.files)
    mola = find_claim(claims, "peak memory", "MoLA")
    assert (
        mola.ours.ratio == pytest.approx(14.0 / 13.0) and "0.074 times what the paper has above 1" in mola.why
    )


@pytest.mark.parametrize(
    ("arm", "name", "peak_gib"), [("adafuse_switch", "AdaFuse", 14.3), ("mola_loop", "MoLA", 12.0)]
)
def test_memory_that_differs_is_not_replicated(tmp_path, arm, name, peak_gib):
    write_both(tmp_path, PEAKS | {arm: peak_gib})
    assert find_claim(by_text(tmp_path), "peak memory", name).verdict == NOT_REPLICATED


def test_memory_that_was_not_measured_says_what_to_run(tmp_path):
    synthetic.write_latency(tmp_path, machine=GPU)
    claim = find_claim(by_text(tmp_path), "peak memory", "MoLA")
    assert (claim.verdict, claim.why) == (NOT_TESTABLE, "not measured: experiment=table5")
    write_memory(tmp_path, "mola_loop", 14.0)
    claim = find_claim(by_text(tmp_path), "peak memory", "MoLA")
    assert claim.why == "of the backbone, not measured: experiment=table5" and claim.ours is None


def test_memory_on_a_cpu_is_not_testable(tmp_path):
    synthetic.write_latency(tmp_path)
    for arm in PEAKS:
        write_memory(tmp_path, arm, None)
    claim = find_claim(by_text(tmp_path), "peak memory", "MoLA")
    assert (claim.verdict, claim.why) == (NOT_TESTABLE, "on CPU, tiny backbone: a peak needs a GPU")


def test_memory_is_judged_without_a_latency_cell(tmp_path):
    write_peaks(tmp_path)
    claims = [claim for claim in by_text(tmp_path).values() if claim.cell != "Not run"]
    assert [claim.verdict for claim in claims] == [REPLICATED, NOT_REPLICATED, REPLICATED, NOT_REPLICATED]
    assert all("peak memory" in claim.text and claim.cell.endswith("memory only") for claim in claims)
