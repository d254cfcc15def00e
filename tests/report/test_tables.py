"""Tables from data: the right number in the right place, the paper's beside it, and a reason in every gap."""

import math

import pytest

from adafuse.report import page, tables
from synthetic.board import PAPER, SPECS, Made, around, minus, paper_cell


@pytest.fixture
def made():
    return Made()


def every(made):
    return {
        table["name"]: table["sections"] for table in tables.all_tables(made.cells, SPECS["tables"], PAPER)
    }


def markdown(sections):
    return page.rendered("table.md", table={"title": "Title", "about": "about", "sections": sections})


def texts(section, line=0):
    return section.lines[line].texts


def small(made, columns, **spec):
    """A table of a specification of its own."""
    whole = {"name": "own", "title": "Own", "about": "about", "experiments": "all", "columns": columns} | spec
    (table,) = tables.all_tables(made.cells, {"tables": [whole]}, PAPER)
    return table["sections"]


def test_a_missing_value_shows_its_reason(made):
    place = made.cell("table1")
    made.row(place, "base", {"ms_per_token": 5.0})
    made.row(place, "mola_loop", {"ms_per_token": "check failed: logits 0.5, bound 0.1"})
    columns = [
        {"heading": "method", "label": "label"},
        {"heading": "ms", "quantity": "ms_per_token", "reason": True},
    ]
    columns.append({"heading": "ratio", "quantity": "ratio", "format": "ratio"})
    (section,) = small(made, columns, having=["ms_per_token"])
    assert list(texts(section)) == ["method", "ms"], "a column in which nothing stands is left out"
    assert texts(section) == {"method": "Backbone", "ms": "5.00"}
    assert texts(section, 1)["ms"] == "check failed: logits 0.5, bound 0.1"
    assert "| MoLA | check failed: logits 0.5, bound 0.1 |" in markdown([section])
    assert [line.records for line in section.lines] == [("0" * 12,)] * 2


def test_tables_that_were_not_run_say_so(made):
    found = every(made)
    for name, experiment in {
        "table1": "table1",
        "kernels": "kernels",
        "drift": "drift",
        "generation": "generation",
    }.items():
        (section,) = found[name]
        assert section.heading == "No records" and f"experiment={experiment}" in texts(section)["ours"], name
    assert "93.12" in markdown(found["table3"]) and "81.29" in markdown(found["table4"])


def test_the_latency_tables_stand_beside_the_paper(made):
    place = paper_cell(made)
    check = {"check": 0.07, "check_bound": 0.165, "over_floor": 7.4, "floor_ms": 2.93}
    made.numbers(place, "mola_loop", check)
    found = every(made)
    mola = texts(found["table1"][0], 1)
    assert mola["method"] == "MoLA" and mola["ratio to backbone [95 %]"] == "10.50 [10.29, 10.71]"
    assert mola["paper's ratio"] == "10.5 (+954 %)" and mola["paper's parameters"] == "7.07 G (+4.9 %)"
    assert (
        mola["parameters"] == "7.07 G (+4.9 %)"
        and mola["paper's ms"] == "25.3"
        and mola["time / floor"] == "7.40"
    )
    notes = " ".join(found["table1"][0].notes)
    assert "not comparable" in notes and "Paper, MOLA: its 26.3 GiB fit fp32 weights" in notes
    assert texts(found["table5"][0], 4)["paper's GiB"] == "13.8 (+7 %)"
    assert [line.at[2] for line in found["table6"][0].lines][1:3] == [
        "moral_loop",
        "moral_simple_merge",
    ]
    (attribution,) = found["attribution"]
    assert len(attribution.lines) == 7 and all(line.records for line in attribution.lines)


def test_a_ratio_inside_the_noise_is_not_resolved(made):
    place = paper_cell(made)
    made.row(place, "lora_rebase", {"ms_per_token": 10.0, "ratio": around(1.005)})
    (section,) = every(made)["attribution"]
    shown = {line.at[2]: line.texts["ratio to backbone [95 %]"] for line in section.lines}
    assert shown["lora_rebase"].startswith("not resolved: ") and not shown["mola_loop"].startswith("not")


def test_a_cell_with_one_of_the_papers_rows_is_no_cell_of_its_tables(made):
    place = made.cell("table1", "a scan")
    made.row(place, "base", {"ms_per_token": 5.0})
    assert every(made)["table1"][0].heading == "No records"
    made.row(place, "mola_loop", {"ms_per_token": 50.0})
    assert len(every(made)["table1"][0].lines) == 4


def test_checks_stand_beside_their_bounds(made):
    place = made.cell("graph")
    own = {"check.logits": (0.07, math.nan, 0.165, 1), "check.greedy": (3.0, math.nan, 0.0, 1)}
    own |= {"ms_per_token": "check failed: greedy 3, bound 0"}
    made.row(place, "base_graph", own)
    (section,) = every(made)["checks"]
    assert texts(section) == {
        "arm": "base_graph",
        "logits": "0.07 of 0.165",
        "greedy": "3 of 0",
        "ms/token": "check failed: greedy 3, bound 0",
    }


def test_timing_and_calibration(made):
    place = paper_cell(made)
    left_out = {"again_ratio": around(1.0), "blocks": 72, "excluded": 3, "left_out": "3 first of a process"}
    made.numbers(place, "eager", left_out)
    made.numbers(place, "machine", {"read_gbps": 4100.0, "launch_us": 2.0})
    found = every(made)
    timing = texts(found["timing"][0])
    assert timing["A/A ratio [95 %]"] == "1.00 [0.98, 1.02]" and timing["resolution"] == "± 1 %"
    assert timing["left out"] == "3 first of a process" and timing["processes"] == "3"
    assert texts(found["calibration"][0])["read GB/s"] == "4100"


def test_a_scan_is_sorted_by_its_axis_and_pairs_the_gates(made):
    for batch in (8, 64, 1):
        place = made.cell("batch_scan", f"b{batch}", batch=batch)
        made.row(place, "base_graph", {"ms_per_token": 6.0}, runtime="graph")
        numbers = {"ratio": around(1.07), "gate_ratio": around(1.01, 0.001)}
        made.row(place, "adafuse_layerwise_gather_graph", numbers, "a gate per layer", runtime="graph")
    (section,) = every(made)["scans"]
    assert section.heading.startswith("Over batch") and [line.texts["batch"] for line in section.lines] == [
        "1",
        "8",
        "64",
    ]
    assert texts(section)["per layer / one gate"] == "1.010 [1.009, 1.011]"
    assert texts(section)["a gate per layer"] == "1.07 [1.05, 1.09]"


def test_accuracy_has_errors_differences_and_the_papers_block(made):
    place = made.cell("table2", "small", task="evaluate")
    own = {
        "accuracy.copy": 0.998,
        "error.copy": 0.001,
        "accuracy.average": (0.5, 0.4, 0.6, 5),
        "error.average": 0.02,
    }
    made.row(place, "adafuse", own | minus(-0.7, 0.9, "lora", n=15), method="adafuse")
    made.row(place, "lora", {"accuracy.average": "error: out of memory"}, method="lora")
    ours, printed = every(made)["table2"]
    assert texts(ours) | {"copy": "99.8 ± 0.1", "average": "50.0 ± 2.0", "seeds": "5"} == texts(ours)
    assert texts(ours)["minus plain LoRA [95 %]"] == "-0.7 [-1.6, +0.2]"
    assert texts(ours, 1)["average"] == "error: out of memory"
    assert printed.lines[-1].texts["average"] == "60.12" and printed.lines[-1].texts["minus LoRA"] == "+0.48"
    judged = texts(every(made)["accuracy"][0])
    assert judged["minus plain LoRA"] == "-0.7 [-1.6, +0.2] on par" and "minus MoLA" not in judged


def test_what_hangs_on_one_task_is_a_line_each(made):
    place = made.cell("table2", "small", task="evaluate")
    numbers = minus(1, 2, "lora.sort") | {
        f"rest.lora.{task}": (0.01, 0.0, 0.02, 5) for task in ("sort", "copy")
    }
    made.row(place, "adafuse", numbers, method="adafuse")
    (section,) = every(made)["accuracy_tasks"]
    assert [line.texts["task"] for line in section.lines] == ["sort", "copy"]
    assert section.lines[0].texts["minus plain LoRA"] == "+1.0 [-1.0, +3.0]"


def test_columns_of_numbers_are_sorted(made):
    place = made.cell("learning_rate", task="train")
    made.row(place, "lora", {"validation_loss.0.003": 0.5, "validation_loss.3e-05": 1.4, "best_rate": 0.003})
    made.row(place, "mola", {"validation_loss.0.001": 0.4, "best_rate": 0.001})
    (section,) = every(made)["learning_rates"]
    assert list(texts(section)) == ["method", "3e-05", "0.001", "0.003", "best"]
    assert texts(section, 1)["0.003"] == "–"
