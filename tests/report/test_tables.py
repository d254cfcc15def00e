"""Tables from data: the right number in the right place, the paper's beside it, and a reason in every gap."""

import math

import pytest

from adafuse.report import tables
from adafuse.report.claims import all_claims, all_goals
from report.made_board import PAPER, SPECS, Made, around, minus, paper_cell


@pytest.fixture
def made():
    return Made()


def every(made):
    return {table.name: table for table in tables.all_tables(made.board, SPECS["tables"], PAPER)}


def texts(section, line=0):
    return {name: shown.text for name, shown in section.lines[line].shown.items() if name in section.headings}


def small(made, columns, **spec):
    """A table of a specification of its own."""
    whole = {"name": "own", "title": "Own", "about": "about", "experiments": "all", "columns": columns} | spec
    (table,) = tables.all_tables(made.board, {"tables": [whole]}, PAPER)
    return table


def test_a_missing_value_shows_its_reason(made):
    place = made.cell("table1")
    made.row(place, "base", {"ms_per_token": 5.0})
    made.row(place, "mola_loop", {"ms_per_token": "check failed: logits 0.5, bound 0.1"})
    columns = [
        {"heading": "method", "label": "label"},
        {"heading": "ms", "quantity": "ms_per_token", "reason": True},
    ]
    columns.append({"heading": "ratio", "quantity": "ratio", "format": "ratio"})
    table = small(made, columns, having=["ms_per_token"])
    (section,) = table.sections
    assert section.headings == ["method", "ms"], "a column in which nothing stands is left out"
    assert texts(section) == {"method": "Backbone", "ms": "5.00"}
    assert texts(section, 1)["ms"] == "check failed: logits 0.5, bound 0.1"
    assert "| MoLA | check failed: logits 0.5, bound 0.1 |" in tables.markdown(table)
    found = tables.frame(table)
    assert (
        found["ms"].tolist() == [5.0, "check failed: logits 0.5, bound 0.1"]
        and found["records"].tolist() == ["0" * 12] * 2
    )


def test_tables_that_were_not_run_say_so(made):
    found = every(made)
    for name, experiment in {
        "table1": "table1",
        "kernels": "kernels",
        "drift": "drift",
        "generation": "generation",
    }.items():
        (section,) = found[name].sections
        assert section.heading == "No records" and f"experiment={experiment}" in texts(section)["ours"], name
    assert "93.12" in tables.markdown(found["table3"]) and "81.29" in tables.markdown(found["table4"])


def test_the_latency_tables_stand_beside_the_paper(made):
    place = paper_cell(made)
    check = {"check": 0.07, "check_bound": 0.165, "over_floor": 7.4, "floor_ms": 2.93}
    made.numbers(place, "mola_loop", check)
    found = every(made)
    mola = texts(found["table1"].sections[0], 1)
    assert mola["method"] == "MoLA" and mola["ratio to backbone [95 %]"] == "10.50 [10.29, 10.71]"
    assert mola["paper's ratio"] == "10.5 (+954 %)" and mola["paper's parameters"] == "7.07 G (+4.9 %)"
    assert (
        mola["parameters"] == "7.07 G (+4.9 %)"
        and mola["paper's ms"] == "25.3"
        and mola["time / floor"] == "7.40"
    )
    notes = " ".join(found["table1"].sections[0].notes)
    assert "not comparable" in notes and "Paper, MOLA: its 26.3 GiB fit fp32 weights" in notes
    assert texts(found["table5"].sections[0], 4)["paper's GiB"] == "13.8 (+7 %)"
    assert [line.key[2] for line in found["table6"].sections[0].lines][1:3] == [
        "moral_loop",
        "moral_simple_merge",
    ]
    (attribution,) = found["attribution"].sections
    assert len(attribution.lines) == 7 and all(line.records for line in attribution.lines)


def test_a_ratio_inside_the_noise_is_not_resolved(made):
    place = paper_cell(made)
    made.row(place, "lora_rebase", {"ms_per_token": 10.0, "ratio": around(1.005)})
    (section,) = every(made)["attribution"].sections
    shown = {line.key[2]: line.shown["ratio to backbone [95 %]"].text for line in section.lines}
    assert shown["lora_rebase"].startswith("not resolved: ") and not shown["mola_loop"].startswith("not")


def test_a_cell_with_one_of_the_papers_rows_is_no_cell_of_its_tables(made):
    place = made.cell("table1", "a scan")
    made.row(place, "base", {"ms_per_token": 5.0})
    assert every(made)["table1"].sections[0].heading == "No records"
    made.row(place, "mola_loop", {"ms_per_token": 50.0})
    assert len(every(made)["table1"].sections[0].lines) == 4


def test_checks_are_a_line_each(made):
    place = made.cell("graph")
    own = {
        "check.logits": 0.07,
        "bound.logits": 0.165,
        "passed.logits": 1.0,
        "check.greedy": 3.0,
        "bound.greedy": 0.0,
    }
    made.row(place, "base_graph", own | {"passed.greedy": 0.0})
    (section,) = every(made)["checks"].sections
    assert [line.shown["check"].text for line in section.lines] == ["logits", "greedy"]
    assert texts(section, 1) | {"passed": "no", "worst value": "3"} == texts(section, 1)
    assert section.lines[0].shown["passed"].text == "yes"


def test_timing_and_calibration(made):
    place = paper_cell(made)
    left_out = {"again_ratio": around(1.0), "blocks": 72, "excluded": 3, "left_out": "3 first of a process"}
    made.numbers(place, "eager", left_out)
    made.numbers(place, "machine", {"read_gbps": 4100.0, "launch_us": 2.0})
    found = every(made)
    timing = texts(found["timing"].sections[0])
    assert timing["A/A ratio [95 %]"] == "1.00 [0.98, 1.02]" and timing["resolution"] == "± 1 %"
    assert timing["left out"] == "3 first of a process" and timing["processes"] == "3"
    assert texts(found["calibration"].sections[0])["read GB/s"] == "4100"


def test_a_scan_is_sorted_by_its_axis_and_pairs_the_gates(made):
    for batch in (8, 64, 1):
        place = made.cell("batch_scan", f"b{batch}", batch=batch)
        made.row(place, "base_graph", {"ms_per_token": 6.0}, runtime="graph")
        numbers = {"ratio": around(1.07), "gate_ratio": around(1.01, 0.001)}
        made.row(place, "adafuse_layerwise_gather_graph", numbers, "a gate per layer", runtime="graph")
    (section,) = every(made)["scans"].sections
    assert section.heading.startswith("Over batch") and [
        line.shown["batch"].text for line in section.lines
    ] == ["1", "8", "64"]
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
    ours, printed = every(made)["table2"].sections
    assert texts(ours) | {"copy": "99.8 ± 0.1", "average": "50.0 ± 2.0", "seeds": "5"} == texts(ours)
    assert texts(ours)["minus plain LoRA [95 %]"] == "-0.7 [-1.6, +0.2]"
    assert texts(ours, 1)["average"] == "error: out of memory"
    assert (
        printed.lines[-1].shown["average"].text == "60.12"
        and printed.lines[-1].shown["minus LoRA"].text == "+0.48"
    )
    judged = texts(every(made)["accuracy"].sections[0])
    assert judged["minus plain LoRA"] == "-0.7 [-1.6, +0.2] on par" and "minus MoLA" not in judged


def test_what_hangs_on_one_task_is_a_line_each(made):
    place = made.cell("table2", "small", task="evaluate")
    numbers = minus(1, 2, "lora.sort") | {
        f"rest.lora.{task}": (0.01, 0.0, 0.02, 5) for task in ("sort", "copy")
    }
    made.row(place, "adafuse", numbers, method="adafuse")
    (section,) = every(made)["accuracy_tasks"].sections
    assert [line.shown["task"].text for line in section.lines] == ["sort", "copy"]
    assert section.lines[0].shown["minus plain LoRA"].text == "+1.0 [-1.0, +3.0]"


def test_columns_of_numbers_are_sorted(made):
    place = made.cell("learning_rate", task="train")
    made.row(place, "lora", {"validation_loss.0.003": 0.5, "validation_loss.3e-05": 1.4, "best_rate": 0.003})
    made.row(place, "mola", {"validation_loss.0.001": 0.4, "best_rate": 0.001})
    (section,) = every(made)["learning_rates"].sections
    assert section.headings == ["method", "3e-05", "0.001", "0.003", "best"]
    assert texts(section, 1)["0.003"] == "–"


def test_verdicts_and_records_are_tables_too(made):
    paper_cell(made)
    board = made.board
    claims = tables.claims_table(all_claims(board, SPECS["claims"], PAPER), board, "the rules")
    assert (
        claims.sections[0].heading == "NVIDIA H200 · table1 NVIDIA H200"
        and claims.sections[-1].heading == "Not run"
    )
    assert (
        "| Tables 1, 5 | MoLA: a token costs 10.54 times the backbone's | 10.54 (+954 %) |"
        in tables.markdown(claims)
    )
    found = tables.frame(claims)
    assert found.loc[0, "ours [95 %] low"] < found.loc[0, "ours [95 %]"] and len(found) == 26
    goals = tables.goals_table(all_goals(board, SPECS["claims"]), "ours")
    assert len(goals.sections[0].lines) == 11
    assert tables.goals_table([], "ours").sections[0].heading == "No records"


def test_numbers_for_programs_keep_their_interval(made):
    paper_cell(made)
    (section, *_), name = every(made)["table6"].sections, "ratio to backbone [95 %]"
    number = section.lines[1].shown[name].number
    assert number.low < number.value < number.high and math.isnan(
        section.lines[1].shown["ms/token"].number.low
    )
