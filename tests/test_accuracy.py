"""Studies: which evaluations are pooled, which stand in Tables 2 to 4, and what a row says of its size."""

import json
from pathlib import Path

import pytest

import synthetic
import synthetic_study as study
from adafuse.records import load
from adafuse.report import accuracy, find, sheet
from adafuse.report.accuracy_table import table
from adafuse.report.paper import load_paper

METHODS = {"base": 0.35, "lora": 0.70, "adafuse": 0.71}


def studies(folder: Path) -> list[accuracy.Study]:
    return find(load([folder])).trained.studies


def table2(folder: Path) -> sheet.Sheet:
    found = find(load([folder])).trained
    return table("table2", found.studies, load_paper(), found.fits)


def test_budgets_are_studies_of_their_own_and_say_so(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    study.write_study(tmp_path, METHODS, seeds=2, changes={"budget": "equal", "method.rank": 3})
    headings = [section.heading for section in table2(tmp_path).sections]
    assert [heading.split(" · ")[-1] for heading in headings[:2]] == ["equal parameters", "published sizes"]
    claims = {claim.cell for claim in find(load([tmp_path])).claims if claim.where == "Table 2"}
    assert claims == set(headings[:2])


def test_records_older_than_a_setting_are_pooled_with_its_default(tmp_path: Path) -> None:
    study.write_evaluation(tmp_path, "lora", seed=0)
    records = load([tmp_path])
    for name in ("budget", "evaluate_dtype", "evaluate_strategy"):
        del records[0].run["config"][name]
    del records[0].run["config"]["data"]["level"]
    study.write_evaluation(tmp_path, "lora", seed=1)
    newer = [r for r in load([tmp_path]) if r.run["seed"] == 1]
    (found,) = accuracy.studies([*records, *newer])
    assert sorted(found.variants["lora"]) == [0, 1]


@pytest.mark.parametrize(
    "changes", [{"evaluate_dtype": "bfloat16"}, {"evaluate_strategy": "switch"}], ids=["dtype", "strategy"]
)
def test_other_precisions_and_strategies_make_no_section(tmp_path: Path, changes: dict) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    study.write_evaluation(tmp_path, "adafuse", 0.5, changes=changes)
    study.write_evaluation(tmp_path, "base", 0.5, changes=changes)
    (found,) = studies(tmp_path)
    assert sorted(found.variants["adafuse"]) == sorted(found.variants["base"]) == [0, 1]
    assert all(len(records) == 1 for records in found.variants["base"].values())


def test_a_study_of_one_knob_makes_no_section_and_no_claim(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    before = [(c.cell, c.text, c.ours) for c in find(load([tmp_path])).claims]
    study.write_study(tmp_path, {"adafuse": 0.6}, seeds=2, changes={"method.balance_coefficient": 0.0})
    study.write_study(tmp_path, {"adafuse": 0.6}, seeds=2, changes={"experts.rank": 64})
    # families of their own: only AdaFuse is trained on them
    for point in ("first_linear", "embedding"):
        changes = {"data.name": "twins", "method.router_input": point}
        study.write_study(tmp_path, {"base": 0.3, "adafuse": 0.6}, seeds=2, changes=changes)
    (found,) = studies(tmp_path)
    assert list(found.variants) == ["base", "lora", "adafuse"]
    assert [(c.cell, c.text, c.ours) for c in find(load([tmp_path])).claims] == before


def test_data_made_for_a_question_are_no_table_2(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    study.write_study(tmp_path, METHODS, seeds=2, changes={"data.name": "same_tokens"})
    (found,) = studies(tmp_path)
    assert found.cell.config["data"]["name"] == "mixture"


def test_one_method_alone_is_still_shown(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.6}, seeds=2)
    assert [list(found.variants) for found in studies(tmp_path)] == [["adafuse"]]


def test_items_under_another_hash_are_not_paired(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    (found,) = studies(tmp_path)
    assert accuracy.difference(found, "adafuse", "lora").value == pytest.approx(0.01)
    for seed in (0, 1):
        for line in found.variants["lora"][seed][0].of("metric"):
            line["task_hash"] = "other"
    assert accuracy.difference(found, "adafuse", "lora") is None


def test_methods_on_different_backbones_are_not_paired(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=3)
    (found,) = studies(tmp_path)
    for method in ("lora", "adafuse"):
        for seed in range(3):
            # the last seed's adapter was fitted on the weights of another pre-training run
            other = method == "adafuse" and seed == 2
            found.variants[method][seed][0].lines.append(
                {"kind": "backbone", "sha256": "b" if other else "a"}
            )
    difference = accuracy.difference(found, "adafuse", "lora")
    assert difference is not None and difference.n_seeds == 2
    assert "stand on 2 backbones" in table("table2", [found], load_paper(), {}).sections[0].notes[1]


def test_the_same_weights_under_another_name_are_no_second_backbone(tmp_path: Path) -> None:
    for model, weights in (("tiny", "aa"), ("tiny_again", "aa"), ("tiny_other", "bb")):
        study.write_study(tmp_path, METHODS, seeds=2, changes={"model.name": model}, backbone=weights * 32)
    found = studies(tmp_path)
    assert [one.same_as for one in found] == [None, "tiny", None]
    notes = [section.notes for section in table2(tmp_path).sections]
    assert ["no second backbone" in " ".join(lines) for lines in notes[:3]] == [False, True, False]


def test_rows_say_how_many_parameters_were_trained(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.71}, seeds=2, trainable=1_234_000)
    study.write_study(tmp_path, {"full": 0.75}, seeds=2, trainable=25_000_000)
    study.write_study(tmp_path, {"lora": 0.7}, seeds=2, trainable=None)
    section = table2(tmp_path).sections[0]
    shown = {row["method"]: section.columns["trainable (M)"](row) for row in section.rows}
    assert (shown["adafuse"], shown["full"], shown["lora"]) == ("1.23", "25.0", "–")


def test_notes_hold_difference_test_and_spread(tmp_path: Path) -> None:
    accuracies = {"lora": 0.7, "mola": 0.7, "adafuse_layerwise": 0.7, "adafuse": 0.7}
    study.write_study(tmp_path, accuracies, spread=0.01)
    notes = table2(tmp_path).sections[0].notes
    assert len(notes) == 4 and all("equivalent within ± 2: p = 0.024" in note for note in notes[1:])
    twin, lora, _ = notes[1:]
    assert "between seeds 1.6 points" in lora and lora.startswith("AdaFuse minus plain LoRA: ")
    assert twin.startswith("AdaFuse minus a gate per layer, same experts")


def test_a_csv_row_holds_plain_numbers(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    rows = [sheet.flat(row) for row in table2(tmp_path).sections[0].rows]
    assert json.dumps(rows) and rows[-1]["to_lora_method"] == "t over 2 seeds"


def test_the_backbone_of_older_records_belongs_to_new_adapters(tmp_path: Path) -> None:
    synthetic.write_accuracy(tmp_path, "base")
    synthetic.write_accuracy(tmp_path, "lora", plain={"budget": "equal"})
    (found,) = studies(tmp_path)
    assert list(found.variants) == ["base", "lora"]


def test_each_task_is_left_out_from_the_lowest_rest_to_the_highest(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "mola": 0.7})
    for seed in range(5):
        tilt = {"sort": -0.2, "copy": 0.1, "cloze": 0.01}
        study.write_evaluation(tmp_path, "adafuse", 0.7, seed, tilt=tilt)
        study.write_evaluation(tmp_path, "moral", 0.7, seed, changes={"suite.tasks": ["copy"]})
    (found, *_) = studies(tmp_path)
    rest = accuracy.without_one(found, "adafuse", "lora")
    # sort -20, copy +10, cloze +1, the fourth 0
    assert (rest[0][0], rest[-1][0]) == ("copy", "sort")
    assert rest[0][1].value == pytest.approx(-0.19 / 3) and rest[-1][1].value == pytest.approx(0.11 / 3)
    assert len(rest) == 4 and all(own.n_seeds == 5 for _, own in rest)
    assert accuracy.without_one(found, "lora", "adafuse")[0][0] == "sort"
    assert accuracy.without_one(found, "adafuse", "pesc") == []


def test_one_task_has_no_rest(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.8}, changes={"suite.tasks": ["copy"]})
    (found,) = studies(tmp_path)
    assert accuracy.without_one(found, "adafuse", "lora") == []


def test_the_loss_of_the_training_runs_stands_in_the_table(tmp_path: Path) -> None:
    for method, loss in (("lora", 0.5), ("adafuse", 0.75)):
        study.write_study(tmp_path, {method: 0.7}, loss=loss)
    study.write_evaluation(tmp_path, "base")
    found = find(load([tmp_path])).trained
    paper = load_paper()
    with_losses = table("table2", found.studies, paper, found.fits)
    section = with_losses.sections[0]
    shown = {row["method"]: section.columns["validation loss"](row) for row in section.rows}
    assert (shown["base"], shown["lora"], shown["adafuse"]) == ("–", "0.500", "0.750")
    (note,) = [note for note in section.notes if note.startswith("AdaFuse minus plain LoRA")]
    assert note.endswith("Validation loss: +0.250 [+0.250, +0.250] nats (t over 5 seeds).")
    plain = table("table2", found.studies, paper, {})
    assert "validation loss" not in plain.sections[0].columns and "Validation loss" not in sheet.markdown(
        plain
    )


def test_a_claim_says_what_its_verdict_tests(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.75})
    found = [claim for claim in find(load([tmp_path])).claims if claim.where == "Table 2"]
    by_text = {claim.text: claim.verdict for claim in found}
    assert by_text["AdaFuse no worse than LoRA (plain), average"] == "replicated"
    assert by_text["AdaFuse no worse than PESC, average"] == "not testable here"
