"""Tables: right numbers next to the paper's, a reason in every gap, any mixture of records."""

import types

import pandas as pd
import pytest

import synthetic
from adafuse.records import load
from adafuse.report import all_sheets, draw, find, sheet, timing
from adafuse.report.text import bound_text


def sheets(folder) -> dict[str, sheet.Sheet]:
    return {table.name: table for table in all_sheets(find(load([folder])))}


def row(table: sheet.Sheet, key: str, value: str, section: int = 0) -> dict:
    return next(row for row in table.sections[section].rows if row[key] == value)


def shown(table: sheet.Sheet) -> str:
    return sheet.markdown(table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic.write_all(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, sheet.Sheet]:
    """Every table of a whole profile."""
    return sheets(folder)


def test_every_table_is_there_and_names_its_records(whole):
    found = whole
    names = {"claims", "goals", "table1", "table2", "table3", "table4", "table5", "table6"}
    others = {
        "accuracy",
        "attribution",
        "backbones",
        "scans",
        "layers",
        "kernels",
        "drift",
        "checks",
        "timing",
        "calibration",
        "traces",
        "records",
        "why",
        "routing",
        "generation",
        "learning_rates",
    }
    assert names | others == set(found)
    for name in ("table1", "table5", "table6", "attribution", "checks", "timing", "calibration", "layers"):
        assert all(row["records"] for section in found[name].sections for row in section.rows), name


def test_table1_numbers_and_paper(whole):
    table = whole["table1"]
    moral = row(table, "arm", "moral_loop")
    assert moral["ratio"].ratio == pytest.approx(3.6, rel=0.02)
    assert moral["ratio"].n_processes == 3
    assert moral["paper_ratio"] == pytest.approx(8.6 / 2.4)
    assert moral["params"] == 1_620_000 and moral["paper_params_b"] == 6.97
    text = shown(table)
    assert "## CPU · tiny, float32" in text and "batch 1 · context 64" in text
    assert "profile cpu" in text and "commit 0123456789ab" in text
    assert "8.6" in text and "+258 %" in text and "not comparable" in text


def test_memory_says_what_it_needs(whole):
    assert shown(whole["table5"]).count("not measured: experiment=table5") == 5


@pytest.mark.parametrize("name", ["table1", "table6", "attribution"])
def test_each_row_shows_check_floor_and_record(whole, name):
    """Of the synthetic checks `logits` comes nearest to its bound; the floor is 0.3 ms everywhere."""
    (section,) = whole[name].sections
    assert {"check", "time / floor"} <= set(section.columns)
    for one in section.rows:
        assert section.columns["check"](one) == "logits 1e-06 of 0.001"
        assert one["over_floor"] == pytest.approx(one["ms_per_token"] / 0.3) and one["records"]
    assert f"{section.rows[0]['over_floor']:.2f}" in section.columns["time / floor"](section.rows[0])


def test_table5_shows_the_distance_to_the_floor(whole):
    base = row(whole["table5"], "arm", "base")
    shown_floor = whole["table5"].sections[0].columns["time / floor"](base)
    assert shown_floor == f"{base['ms_per_token'] / 0.3:.2f} × 0.300 ms"


def test_bandwidth_used_is_of_the_calibrated(whole):
    """6 MB in some 2 ms are 3 GB/s, of 20 that the machine reads."""
    section = whole["attribution"].sections[0]
    base = row(whole["attribution"], "arm", "base")
    assert base["bandwidth_share"] == pytest.approx(6e6 / (base["ms_per_token"] * 1e-3) / 20e9)
    assert section.columns["bandwidth used"](base) == f"{100 * base['bandwidth_share']:.0f} %"


def test_ratio_inside_the_noise_is_not_resolved(whole):
    text = shown(whole["attribution"])
    line = next(line for line in text.splitlines() if "LoRA (merged once)" in line)
    assert "not resolved" in line
    assert "not resolved" not in next(line for line in text.splitlines() if "AdaFuse (gather)" in line)


def test_tables_that_were_not_run_say_so(whole):
    found = whole
    assert "not run in this profile: experiment=table3" in shown(found["table3"])
    experiments = {"goals": "graph", "kernels": "kernels", "drift": "drift", "why": "gate_input"}
    for name, experiment in experiments.items():
        (section,) = found[name].sections
        assert section.heading == "No records" and f"experiment={experiment}" in shown(found[name]), name
    assert "93.12" in shown(found["table3"]) and "81.29" in shown(found["table4"])


def test_table2_pairs_with_lora(whole):
    table = whole["table2"]
    adafuse = row(table, "method", "adafuse")
    assert adafuse["seeds"] == 3 and adafuse["to_lora"].n_seeds == 3
    assert adafuse["to_lora"].value == pytest.approx(
        adafuse["average"] - row(table, "method", "lora")["average"]
    )
    assert [r["method"] for r in table.sections[0].rows][:3] == ["base", "full", "lora"]
    assert "52.39" in shown(table) and "same experts (the control" in shown(table)


def test_timing_shows_the_resolution(whole):
    (timing,) = whole["timing"].sections[0].rows
    assert timing["processes"] == 3 and timing["excluded"] == 3
    assert 0 < timing["resolution"] < 0.1


def test_failed_checks_errors_and_absent_arms_give_their_reasons(tmp_path):
    synthetic.write_latency(tmp_path, failed=("mola_loop",), broken=("pesc_loop",))
    text = shown(sheets(tmp_path)["table1"])
    assert "check failed: logits 0.5, bound 0.001" in text
    assert "error: RuntimeError: out of memory" in text
    mola, pesc = (row(sheets(tmp_path)["table1"], "arm", arm) for arm in ("mola_loop", "pesc_loop"))
    check, floor = (
        sheets(tmp_path)["table1"].sections[0].columns[name] for name in ("check", "time / floor")
    )
    assert check(mola) == "failed: logits 0.5 of 0.001" and floor(mola) == floor(pesc) == "–"
    checks = row(sheets(tmp_path)["checks"], "arm", "mola_loop")
    assert checks["passed"] is False
    (record,) = sheets(tmp_path)["records"].sections[0].rows
    assert record["status"] == "error" and record["error"] == "RuntimeError: out of memory"


def test_arms_that_were_not_chosen(tmp_path):
    synthetic.write_latency(tmp_path, arms="controls")
    text = shown(sheets(tmp_path)["table6"])
    assert "not run: arm is not in arms=controls" in text


def test_unfinished_records_give_no_numbers(tmp_path):
    synthetic.write_unfinished(tmp_path / "latency" / "cut.jsonl")
    text = shown(sheets(tmp_path)["table1"])
    assert "unfinished record" in text and "left out as unfinished: latency/cut.jsonl.partial" in text
    assert row(sheets(tmp_path)["records"], "record", "latency/cut.jsonl.partial")["status"] == "unfinished"


def test_an_empty_partial_is_listed(tmp_path):
    (tmp_path / "latency").mkdir()
    (tmp_path / "latency" / "cut.jsonl.partial").write_text("")
    assert row(sheets(tmp_path)["records"], "status", "unfinished")["task"] is None


def test_no_records_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no records found"):
        find(load([tmp_path]))


def test_one_section_for_each_cell(tmp_path):
    synthetic.write_latency(tmp_path)
    synthetic.write_latency(tmp_path, plain={"batch": 4})
    big = {"name": "small", "dtype": "bfloat16", "shape": {}}
    gpu = {"name": "h200", "cpu": "C", "cores": 8, "memory_gib": 100.0, "gpu": "NVIDIA H200", "driver": "1"}
    synthetic.write_latency(tmp_path, plain={"model": big}, machine=gpu)
    headings = [section.heading for section in sheets(tmp_path)["table6"].sections]
    assert [heading.split(" · ")[:2] for heading in headings] == [
        ["NVIDIA H200", "small, bfloat16"],
        ["CPU", "tiny, float32"],
        ["CPU", "tiny, float32"],
    ]
    assert "batch 4" in headings[2]


def test_processes_of_another_machine_are_not_pooled(tmp_path):
    synthetic.write_latency(tmp_path, replicate=0)
    other = synthetic.run_fields("latency", "x", {})["machine"] | {"cpu": "Another CPU"}
    synthetic.write_latency(tmp_path, replicate=1, machine=other)
    sections = sheets(tmp_path)["table1"].sections
    assert len(sections) == 2 and sections[0].rows[1]["ratio"].n_processes == 1


def test_domains_form_one_study_with_the_shared_backbone(tmp_path):
    for family in ("copy", "lookup"):
        plain = {
            "data": {"name": "domain", "families": [family], "path": None},
            "suite": {"name": "families", "tasks": [family]},
        }
        for method in ("base", "lora", "adafuse"):
            synthetic.write_accuracy(tmp_path, method, plain=plain)
    found = sheets(tmp_path)
    (ours, _) = found["table3"].sections
    assert [r["method"] for r in ours.rows if r["seeds"]] == ["base", "lora", "adafuse"]
    assert set(ours.rows[0]) >= {"copy", "lookup"} and "not run: method=mola" in shown(found["table3"])
    assert "not run in this profile: experiment=table2" in shown(found["table2"])


def test_the_backbone_is_shared_by_studies_that_train_differently(tmp_path):
    synthetic.write_accuracy(tmp_path, "base", plain={"train": {"steps": 1}})
    synthetic.write_accuracy(tmp_path, "lora", plain={"train": {"steps": 2}})
    (ours, _) = sheets(tmp_path)["table2"].sections
    assert [r["seeds"] for r in ours.rows if r["method"] in ("base", "lora")] == [1, 1]


def test_csv_holds_plain_numbers(folder, tmp_path):
    draw(find(load([folder])), tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "table1.csv")
    moral = table[table["arm"] == "moral_loop"].iloc[0]
    assert moral["ratio_low"] < moral["ratio"] < moral["ratio_high"]
    assert "latency/paper-tiny-b1-r0.jsonl" in moral["records"]


def test_a_failed_check_is_shown_before_any_that_passed():
    """Where nothing may differ the bound is 0, and no ratio to it tells."""
    passed = {"arm": "base", "check": "logits", "value": 0.9, "bound": 1.0, "passed": True}
    failed = {"arm": "base", "check": "greedy", "value": 3.0, "bound": 0.0, "passed": False}
    cell = types.SimpleNamespace(of=lambda kind: [(None, passed), (None, failed)])
    assert bound_text(timing.decisive_check(cell, "base")) == "failed: greedy 3 of 0"
    cell.of = lambda kind: [(None, failed | {"passed": True, "value": 0.0}), (None, passed)]
    assert bound_text(timing.decisive_check(cell, "base")) == "logits 0.9 of 1"
    assert timing.decisive_check(cell, "mola_loop") is None and bound_text(None) == "–"


def test_processes_of_two_hosts_are_pooled_and_both_hosts_named(tmp_path):
    synthetic.write_latency(tmp_path, replicate=0)
    smaller = synthetic.run_fields("latency", "x", {})["machine"] | {"cores": 32, "memory_gib": 250.0}
    synthetic.write_latency(tmp_path, replicate=1, machine=smaller)
    (section,) = sheets(tmp_path)["table1"].sections
    assert section.rows[1]["ratio"].n_processes == 2
    hosts = section.caption.split(" · ")[0].split(" and ")
    assert len(hosts) == 2 and any("32 cores, 250.0 GiB" in host for host in hosts)
