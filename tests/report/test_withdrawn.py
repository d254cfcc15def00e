"""What is withdrawn: which records, which of their numbers, and that it is said wherever one of them stands."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from adafuse import report
from adafuse.archive import load
from adafuse.records import Record
from adafuse.report import figures, load_measurements, page, specification
from adafuse.report.claims import all_claims, cells
from adafuse.report.compare import compare
from adafuse.report.formats import judged_text, ours_text, shown
from adafuse.report.frames import frames
from adafuse.report.rules import WITHDRAWN, Difference, Number
from synthetic import study
from synthetic.board import PAPER, SPECS
from synthetic.report import edited

WHY = specification("withdrawn")["withdrawn"][0]["why"]
TASKS = ["copy", "comparison"]
LEVEL_3 = {"data.level": 3, "data.families": TASKS, "suite.tasks": TASKS}
METHODS = {"lora": 0.70, "adafuse": 0.71, "adafuse_layerwise": 0.72}


def records(
    folder: Path, changes: dict, methods: dict = METHODS, seeds: int = 5, **how: object
) -> list[Record]:
    loads = {family: [0.125] * 8 for family in TASKS}
    about = {"loads": loads, "information": 0.3, "changes": changes} | how
    return load([study.write_study(folder, methods, seeds, **about)]).records


def measured_anew(old: list[Record]) -> list[Record]:
    """The same, of a header that names its text."""
    for record in old:
        edited(record, lambda line: line.update(text="0123456789ab") if line["kind"] == "run" else None)
        record.path = record.path.with_name(f"{record.path.name.split('.')[0]}f.jsonl")
    return old


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> report.Report:
    return report.build(records(tmp_path_factory.mktemp("records"), LEVEL_3))


def test_a_record_is_withdrawn_by_its_families_level_and_text(tmp_path: Path) -> None:
    changes = [
        LEVEL_3,
        LEVEL_3 | {"data.level": 2},
        LEVEL_3 | {"data.level": 1},
        LEVEL_3 | {"data.families": ["copy", "sort"]},
        LEVEL_3 | {"data.path": "/own"},
    ]
    every = [
        load([study.write_evaluation(tmp_path / str(n), changes=own)]).records[0]
        for n, own in enumerate(changes)
    ]
    every += measured_anew(load([study.write_evaluation(tmp_path / "new", changes=LEVEL_3)]).records)
    older = load([study.write_evaluation(tmp_path / "old", seed=7, changes=LEVEL_3)]).records[0]
    del older.run["config"]["data"]["level"]
    runs = frames([*every, older], withdrawn=specification("withdrawn")["withdrawn"]).runs
    assert list(runs["withdrawn"]) == [WHY, WHY, "", "", "", "", ""]


def test_what_is_made_from_a_wrong_task_is_withdrawn_and_nothing_else(found: report.Report) -> None:
    own = found.measurements[found.measurements["experiment"] == "table2"]
    gone = {quantity: set(marks) for quantity, marks in own.groupby("quantity")["withdrawn"]}
    assert {*map(frozenset, gone.values())} == {frozenset({""}), frozenset({WHY})}
    kept = {quantity for quantity, marks in gone.items() if marks == {""}}
    pairs = {f"{name}.{other}" for name in ("minus", "later") for other in ("lora", "adafuse_layerwise")}
    assert {"accuracy.copy", "error.copy", "minus.lora.copy", "minus.adafuse_layerwise.copy"} <= kept
    # all but the wrong task
    assert {"rest.lora.comparison", "effective_experts.copy", "trainable", "routers"} <= kept
    assert not kept & pairs
    for quantity in ("accuracy.average", "error.average", "accuracy.comparison", "minus.lora", "p.lora"):
        assert gone[quantity] == {WHY}, quantity
    for quantity in ("minus.lora.comparison", "rest.lora.copy", "loss_minus.lora", "validation_loss"):
        assert gone[quantity] == {WHY}, quantity
    for quantity in ("effective_experts", "effective_experts.comparison", "tells_family", "between_layers"):
        assert gone[quantity] == {WHY}, quantity


def test_held_out_losses_by_learning_rate_are_withdrawn(tmp_path: Path) -> None:
    for rate, loss in ((1e-3, 0.9), (3e-3, 0.8)):
        changes = LEVEL_3 | {"train.learning_rate": rate}
        study.write_fit(tmp_path, changes=changes, loss=loss, experiment="learning_rate")
    own = report.build(load([tmp_path]).records).measurements.query("experiment == 'learning_rate'")
    marks = dict(zip(own["quantity"], own["withdrawn"], strict=True))
    assert marks["validation_loss.0.003"] == marks["best_rate"] == WHY


def test_a_difference_is_withdrawn_if_one_side_is(tmp_path: Path) -> None:
    lora = records(tmp_path / "lora", LEVEL_3, {"lora": 0.7})
    right = measured_anew(records(tmp_path / "new", LEVEL_3, {"adafuse": 0.7}, experiment="gate_input"))
    own = report.build([*lora, *right]).measurements.set_index(["experiment", "quantity"])["withdrawn"]
    assert own["gate_input", "accuracy.average"] == "" and own["gate_input", "minus.lora"] == WHY


def test_withdrawn_records_go_once_their_experiment_is_measured_anew(tmp_path: Path) -> None:
    wrong, right = (
        records(tmp_path / "old", LEVEL_3),
        measured_anew(records(tmp_path / "new", LEVEL_3, seeds=1)),
    )
    elsewhere = records(tmp_path / "rank", LEVEL_3, experiment="rank")
    other = records(tmp_path / "two", LEVEL_3 | {"data.level": 2})
    found = report.build([*wrong, *right, *elsewhere, *other])
    runs, members = found.frames.runs, found.frames.members
    assert (runs["withdrawn"] != "").sum() == len(wrong) + len(elsewhere) + len(other)
    level_3 = members[(members["experiment"] == "table2") & (members["level"] == 3)]
    assert set(level_3["record"]) == {one.path.name.split(".")[0].rpartition("-")[2] for one in right}
    # another experiment, and another level, have nothing in their place
    assert (members["withdrawn"] != "").sum() == len(elsewhere) + len(other)
    numbers = found.measurements.query("experiment == 'table2' and quantity == 'accuracy.average'")
    assert sorted(zip(numbers["n"], numbers["withdrawn"], strict=True)) == [*3 * [(1, "")], *3 * [(5, WHY)]]


def test_its_verdict_is_that_it_is_withdrawn(found: report.Report) -> None:
    judged = all_claims(cells(found.measured, found.frames.runs), SPECS["claims"], PAPER)
    own = [claim for claim in judged if claim.kind == "accuracy" and claim.ours]
    assert [claim.verdict.verdict for claim in own] == [WITHDRAWN]
    assert all(WHY in claim.verdict.why and ours_text(claim.ours).startswith("withdrawn: ") for claim in own)


@pytest.mark.parametrize("form", ["score", "points", "judged", "digits"])
def test_every_printed_form_is_marked(form: str) -> None:
    sound = Difference(0.01, 0.0, 0.02, 5, low90=0.0, high90=0.02, p=0.01)
    text = shown(form, replace(sound, withdrawn=WHY))
    assert text == f"withdrawn: {shown(form, sound)}".removesuffix(" on par")
    assert not shown(form, sound).startswith("withdrawn")
    assert "on par" in judged_text(sound) and ours_text(Number(2.0, withdrawn=WHY)).startswith("withdrawn: 2")


def test_it_is_said_on_the_page_in_tables_and_in_the_readme(found: report.Report, tmp_path: Path) -> None:
    told = page.page(found)
    (said,) = told.sentences
    assert said.startswith(
        f"Withdrawn until measured anew: 15 of 15 evaluations and the verdicts on them (1), for {WHY}."
    )
    assert said in page.readme_block(told)
    drawn = page.write(told, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count(f"withdrawn: {WHY}") == len(found.frames.runs)
    (table2,) = (table for table in told.tables if table["name"] == "table2")
    texts = [line.texts for line in table2["sections"][0].lines]
    assert all(own["average"].startswith("withdrawn: ") and own["copy"][0].isdigit() for own in texts)
    verdicts = pd.read_csv(tmp_path / "claims.csv").query("kind == 'accuracy' and value == value")
    assert set(verdicts["verdict"]) == {"withdrawn"} and verdicts["ours"].str.startswith("withdrawn: ").all()
    assert drawn and all(own.title.startswith("Withdrawn: ") and WHY in own.caption for own in drawn)
    assert all("Withdrawn: " in (tmp_path / "figures" / own.file).read_text() for own in drawn)
    again = load_measurements(tmp_path / "measurements.csv.gz")
    assert set(again["withdrawn"]) == {"", WHY}
    assert set(compare(again, found.measurements)["outcome"]) == {"same", "withdrawn on either side"}


def test_of_a_figure_with_other_points_too_each_that_is_withdrawn_is_crossed_out(tmp_path: Path) -> None:
    every = [
        one
        for level in (1, 3)
        for one in records(
            tmp_path / str(level), LEVEL_3 | {"data.level": level}, seeds=1, experiment="difficulty"
        )
    ]
    for planned in figures.plan(report.build(every)):
        if planned.spec["kind"] == "lines":
            assert planned.title.startswith("Withdrawn in part: ")
            (axis,) = figures.DRAW["lines"](planned).axes
            crossed = [line for line in axis.lines if line.get_label() == "withdrawn"]
            assert len(crossed) == 1 and len(crossed[0].get_xdata()) == len(METHODS)
            return
    pytest.fail("no figure over levels")


def test_a_sentence_is_said_of_numbers_that_hold(tmp_path: Path) -> None:
    """The GPU's come first, but for those that are withdrawn."""
    cpu = {"name": "cpu", "cpu": "EPYC", "cores": 2, "memory_gib": 8.0, "gpu": None, "driver": None}
    here = records(tmp_path / "cpu", {"data.families": TASKS, "suite.tasks": TASKS}, machine=cpu)
    gpu = records(tmp_path / "gpu", LEVEL_3 | {"model.name": "small"})
    one_gate, deploy, said = page.page(report.build([*gpu, *here])).sentences
    assert "backbone tiny" in one_gate and "1 studies" in one_gate and said.startswith("Withdrawn")
    assert deploy.startswith("To deploy")
    one_gate, _, *none = page.page(report.build([*measured_anew(gpu), *here])).sentences
    assert "backbone small" in one_gate and "2 studies" in one_gate and not none


def test_a_file_from_before_anything_was_withdrawn_is_read(found: report.Report, tmp_path: Path) -> None:
    found.measurements.drop(columns="withdrawn").to_csv(tmp_path / "old.csv", index=False)
    assert set(load_measurements(tmp_path / "old.csv")["withdrawn"]) == {""}
