"""Studies and their numbers: which evaluations are one row, what it is held against, on which seeds and items."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adafuse.archive import load
from adafuse.records import open_record
from adafuse.report import accuracy
from adafuse.report.frames import frames
from adafuse.report.measurements import Measured
from adafuse.report.membership import of_headers
from synthetic import study
from synthetic.report import edited

METHODS = {"base": 0.35, "lora": 0.70, "adafuse": 0.71}
CELL = "h200 tiny fp32 qv r8 mixture"


def measured(folder: Path, rows: pd.DataFrame | None = None) -> Measured:
    return accuracy.measure(frames(load([folder]).records, rows))


def by_place(found: Measured) -> pd.DataFrame:
    return found.values.set_index(["experiment", "row", "quantity"]).sort_index()


def numbers(folder: Path, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    return by_place(measured(folder, rows))


def shown(found: pd.DataFrame, row: str, quantity: str, experiment: str = "table2") -> pd.Series:
    (index,) = np.flatnonzero(found.index == (experiment, row, quantity))
    return found.iloc[index]


def has(found: pd.DataFrame, row: str, quantity: str, experiment: str = "table2") -> bool:
    return (experiment, row, quantity) in found.index


def rows_of(found: Measured, experiment: str = "table2") -> list[str]:
    return [row.row for row in found.rows if row.experiment == experiment]


# -- which evaluations belong together


def test_a_row_is_a_method_and_a_cell_says_its_budget(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    study.write_study(tmp_path, METHODS, seeds=2, changes={"budget": "equal"})
    found = measured(tmp_path)
    assert [cell.cell for cell in found.cells] == [f"{CELL} equal", CELL]
    assert [cell.title.split(" · ")[-1] for cell in found.cells] == ["equal parameters", "published sizes"]
    assert rows_of(found) == 2 * ["base", "lora", "adafuse"]


def test_records_older_than_a_setting_are_pooled_with_its_default(tmp_path: Path) -> None:
    for seed in (0, 1):
        study.write_evaluation(tmp_path, "lora", seed=seed)
    older, newer = load([tmp_path]).records
    for name in ("budget", "evaluate_dtype", "evaluate_strategy"):
        del older.run["config"][name]
    del older.run["config"]["data"]["level"]
    found = accuracy.studies(frames([older, newer]))
    assert list(zip(found["row"], found["seed"], strict=True)) == [("lora", 0), ("lora", 1)]


def test_a_sweep_is_one_cell_and_its_rows_say_where_they_stand(tmp_path: Path) -> None:
    for rank in (4, 8, 16):
        changes = {"experts.rank": rank}
        study.write_study(tmp_path, {"adafuse": 0.6}, seeds=2, changes=changes, experiment="rank")
    found = measured(tmp_path)
    assert [cell.cell for cell in found.cells] == [CELL.replace("r8", "r*")]
    assert rows_of(found, "rank") == ["adafuse (rank=4)", "adafuse (rank=8)", "adafuse (rank=16)"]


def test_a_setting_that_only_some_jobs_name_leaves_the_others_their_names(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    study.write_study(tmp_path, {"adafuse": 0.6}, seeds=2, changes={"method.balance_coefficient": 0.0})
    study.write_study(tmp_path, {"adafuse": 0.6}, seeds=2, changes={"experts.rank": 64})
    found = measured(tmp_path)
    assert rows_of(found) == ["base", "lora", "adafuse", "adafuse (balance_coefficient=0.0)", "adafuse"]
    assert len({cell.cell for cell in found.cells}) == 2


def test_one_job_that_leaves_a_swept_setting_alone_stands_at_its_value(tmp_path: Path) -> None:
    write_sweep(tmp_path, "experts.rank", {4: 0.6, 16: 0.75}, "rank")
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=1, experiment="rank")
    assert rows_of(measured(tmp_path), "rank") == [f"adafuse (rank={rank})" for rank in (4, 8, 16)]


def test_a_task_over_own_files_is_named_after_their_folder(tmp_path: Path) -> None:
    changes = {"data.path": "/somewhere/mine", "suite.tasks": ["local_answers"]}
    study.write_study(tmp_path, {"lora": 0.6}, seeds=2, changes=changes)
    found = numbers(tmp_path)
    assert shown(found, "lora", "accuracy.mine")["reason"] == "acc, 100 items"
    assert found["cell"].iloc[0] == CELL.replace("mixture", "mine")


def test_a_header_without_a_method_stops_nothing(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    records = load([tmp_path]).records
    for name in ("method", "train", "data"):
        del records[0].run["config"][name]
    assert "lora" in [row.row for row in accuracy.measure(frames(records)).rows]


def test_a_setting_that_never_varies_is_no_part_of_a_name(tmp_path: Path) -> None:
    study.write_study(tmp_path, METHODS, seeds=2, changes={"data.level": 3, "train.steps": 7})
    assert rows_of(measured(tmp_path)) == ["base", "lora", "adafuse"]


def test_settings_of_one_last_word_keep_their_first(tmp_path: Path) -> None:
    for value in (4, 8):
        changes = {"experts.rank": value, "method.rank": value}
        study.write_study(tmp_path, {"adafuse": 0.6}, seeds=1, changes=changes, experiment="both")
    names = [f"adafuse (experts.rank={value}, method.rank={value})" for value in (4, 8)]
    assert rows_of(measured(tmp_path), "both") == names


def test_domains_of_one_seed_are_one_row(tmp_path: Path) -> None:
    for family, value in (("copy", 0.5), ("sort", 0.7)):
        changes = {"data.name": "domain", "data.families": [family], "suite.tasks": [family]}
        study.write_study(tmp_path, {"lora": value, "adafuse": value + 0.1}, seeds=3, changes=changes)
    found = numbers(tmp_path)
    assert shown(found, "lora", "accuracy.average")["value"] == pytest.approx(0.6)
    gap = shown(found, "adafuse", "minus.lora")
    assert (gap["value"], gap["n"]) == (pytest.approx(0.1), 3)
    assert len(gap["records"].split()) == 12


def test_a_pilot_seed_counts_only_where_settings_were_chosen(tmp_path: Path) -> None:
    for experiment in ("table2", "difficulty"):
        for seed in (0, 100):
            study.write_evaluation(tmp_path, "lora", seed=seed, experiment=experiment)
    seeds = accuracy.studies(frames(load([tmp_path]).records)).groupby("experiment")["seed"].agg(list)
    assert seeds.to_dict() == {"table2": [0], "difficulty": [0, 100]}


def test_a_record_may_serve_several_experiments(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=2)
    rows = of_headers(load([tmp_path]).records)
    shared = rows.assign(experiment="rank", overrides=rows["overrides"] + " experts.rank=8")
    found = numbers(tmp_path, pd.concat([rows, shared]))
    assert shown(found, "adafuse", "accuracy.average", "rank")["value"] == pytest.approx(0.7)
    assert shown(found, "adafuse", "validation_loss", "rank")["value"] == pytest.approx(0.8)


# -- the numbers of a row


def test_the_error_is_over_seeds_and_over_items_for_one(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=3, spread=0.1)
    found = numbers(tmp_path)
    mean, error = (shown(found, "adafuse", f"{name}.average") for name in ("accuracy", "error"))
    assert (mean["value"], mean["n"]) == (pytest.approx(0.7), 3)
    assert error["value"] == pytest.approx(0.1 / math.sqrt(3))
    # t of 95 % at two degrees of freedom
    assert mean["high"] - mean["value"] == pytest.approx(4.302653 * error["value"])
    alone = numbers(Path(study.write_evaluation(tmp_path / "one", "lora", 0.5)).parents[1])
    of_items = shown(alone, "lora", "error.copy")["value"]
    assert of_items == pytest.approx(0.5 / math.sqrt(99))
    assert shown(alone, "lora", "error.average")["value"] == pytest.approx(of_items / 2)
    assert math.isnan(shown(alone, "lora", "accuracy.average")["low"])


def test_rows_say_how_many_parameters_were_trained(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"full": 0.75}, seeds=2, trainable=25_000_000)
    study.write_study(tmp_path, {"lora": 0.7}, seeds=2, trainable=None)
    found = numbers(tmp_path)
    assert shown(found, "full", "trainable")["value"] == 25_000_000
    assert not has(found, "lora", "trainable")


def test_a_row_without_a_number_says_why(tmp_path: Path) -> None:
    path = study.write_evaluation(tmp_path, "lora")
    study.write_evaluation(tmp_path, "mola").rename(tmp_path / "evaluate" / "mola-s0-0000000a.jsonl.partial")
    header = load([path]).records[0].run
    failed = path.with_name("pesc-s0-0000000b.jsonl")
    header["config"]["method"]["name"] = "pesc"
    with pytest.raises(RuntimeError), open_record(failed, {k: v for k, v in header.items() if k != "kind"}):
        raise RuntimeError("out of memory")
    found = numbers(tmp_path)
    assert shown(found, "mola", "accuracy.average")["reason"].startswith("unfinished record")
    assert shown(found, "pesc", "accuracy.average")["reason"] == "error: RuntimeError: out of memory"
    assert shown(found, "lora", "accuracy.average")["reason"] == ""


# -- how far one row lies from another


def test_a_difference_has_its_test_and_its_spread(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, spread=0.01)
    found = numbers(tmp_path)
    gap = shown(found, "adafuse", "minus.lora")
    assert (gap["value"], gap["n"], gap["reason"]) == (pytest.approx(0, abs=1e-9), 5, "t over 5 seeds")
    spread = shown(found, "adafuse", "spread.lora")["value"]
    assert spread == pytest.approx(0.0158114)
    assert shown(found, "adafuse", "p.lora")["value"] == pytest.approx(0.0236, rel=0.01)
    narrow = shown(found, "adafuse", "minus90.lora")
    assert gap["low"] < narrow["low"] < 0 < narrow["high"] < gap["high"]
    assert not has(found, "lora", "minus.lora")


def test_every_method_is_held_against_lora_and_adafuse_against_all(tmp_path: Path) -> None:
    values = {"lora": 0.7, "mola": 0.72, "pesc": 0.6, "adafuse_layerwise": 0.71, "adafuse": 0.75}
    study.write_study(tmp_path, values)
    found = numbers(tmp_path)
    for name, value in values.items():
        if name != "lora":
            assert shown(found, name, "minus.lora")["value"] == pytest.approx(value - 0.7)
        if name != "adafuse":
            assert shown(found, "adafuse", f"minus.{name}")["value"] == pytest.approx(0.75 - value)
    assert shown(found, "adafuse", "minus.moral")["reason"] == "not run for moral"
    assert not has(found, "mola", "minus.pesc")


@pytest.mark.parametrize("what", ["hash", "count"])
def test_other_items_are_not_paired(tmp_path: Path, what: str) -> None:
    study.write_study(tmp_path, METHODS, seeds=2)
    records = load([tmp_path]).records

    def change(line: dict[str, Any]) -> None:
        if line["kind"] == "metric" and what == "hash":
            line["task_hash"] = "other"
        if line["kind"] == "items" and what == "count":
            line["correct"] = line["correct"][1:]

    for record in records:
        if record.run["config"]["method"]["name"] == "lora":
            edited(record, change)
    found = by_place(accuracy.measure(frames(records)))
    assert not has(found, "adafuse", "minus.lora") and has(found, "adafuse", "accuracy.average")


def test_methods_on_different_backbones_are_not_paired(tmp_path: Path) -> None:
    for seed in range(3):
        study.write_evaluation(tmp_path, "lora", 0.7, seed, backbone="aa")
        # the last seed's adapter was fitted on the weights of another pre-training run
        study.write_evaluation(tmp_path, "adafuse", 0.7, seed, backbone="bb" if seed == 2 else "aa")
    found = numbers(tmp_path)
    assert shown(found, "adafuse", "minus.lora")["n"] == 2


def test_the_same_weights_under_another_name_are_told(tmp_path: Path) -> None:
    for model, weights in (("tiny", "aa"), ("tiny_again", "aa"), ("tiny_other", "bb")):
        study.write_study(tmp_path, METHODS, seeds=2, changes={"model.name": model}, backbone=weights)
    found = numbers(tmp_path).query("quantity == 'same_weights'")
    told = {one["cell"].split(" ")[1]: one["reason"] for _, one in found.iterrows()}
    assert told == {"tiny": "tiny_again", "tiny_again": "tiny"}


def test_each_task_is_told_and_left_out_once(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "mola": 0.7})
    for seed in range(5):
        study.write_evaluation(
            tmp_path, "adafuse", 0.7, seed, tilt={"sort": -0.2, "copy": 0.1, "cloze": 0.01}
        )
    found = numbers(tmp_path)
    assert shown(found, "adafuse", "minus.lora.sort")["value"] == pytest.approx(-0.2)
    assert shown(found, "adafuse", "rest.lora.copy")["value"] == pytest.approx(-0.19 / 3)
    assert shown(found, "adafuse", "rest.lora.sort")["value"] == pytest.approx(0.11 / 3)
    assert has(found, "adafuse", "p.rest.lora.sort") and not has(found, "adafuse", "rest.mola.sort")


def test_one_task_has_no_rest(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.8}, changes={"suite.tasks": ["copy"]})
    found = numbers(tmp_path)
    assert has(found, "adafuse", "minus.lora") and not has(found, "adafuse", "rest.lora.copy")


def test_seeds_beyond_the_first_five_stand_alone(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7}, seeds=8)
    for seed in range(8):
        study.write_evaluation(tmp_path, "adafuse", 0.7 if seed < 5 else 0.8, seed)
    found = numbers(tmp_path)
    later = shown(found, "adafuse", "later.lora")
    assert (later["value"], later["n"]) == (pytest.approx(0.1), 3)
    assert shown(found, "adafuse", "minus.lora")["value"] == pytest.approx(0.3 / 8)
    few = numbers(study.write_study(tmp_path / "few", {"lora": 0.7, "adafuse": 0.7}))
    assert not has(few, "adafuse", "later.lora")


def write_sweep(
    folder: Path, axis: str, values: dict[Any, float], experiment: str, twin: float = 0.0
) -> None:
    """AdaFuse, and its twin lower by `twin`, at each value of one setting."""
    for value, reached in values.items():
        methods = {"adafuse": reached} | ({"adafuse_layerwise": reached - twin} if twin else {})
        study.write_study(folder, methods, seeds=2, changes={axis: value}, experiment=experiment)


def test_a_sweep_is_held_against_its_twin_and_its_default(tmp_path: Path) -> None:
    write_sweep(tmp_path, "experts.rank", {4: 0.6, 8: 0.7, 16: 0.75}, "rank", twin=0.02)
    # the default is what most evaluations of this backbone have
    study.write_study(tmp_path, METHODS, seeds=2)
    found = numbers(tmp_path)
    row = "adafuse (rank=16)"
    assert shown(found, row, "minus.adafuse_layerwise", "rank")["value"] == pytest.approx(0.02)
    assert shown(found, row, "minus.default.rank", "rank")["value"] == pytest.approx(0.05)
    assert not has(found, "adafuse (rank=8)", "minus.default.rank", "rank")
    # no row of table2 is on this cell, which has no rank
    assert not has(found, row, "minus.lora", "rank")


def test_a_sweep_without_a_twin_is_held_against_that_of_the_same_cell(tmp_path: Path) -> None:
    write_sweep(tmp_path, "method.router_input", {"first_linear": 0.6, "embedding": 0.7}, "gate_input")
    study.write_study(tmp_path, {"lora": 0.8, "adafuse_layerwise": 0.75}, seeds=2, experiment="same_tokens")
    found = numbers(tmp_path)
    gap = shown(found, "adafuse (router_input=embedding)", "minus.adafuse_layerwise", "gate_input")
    assert (gap["value"], gap["n"]) == (pytest.approx(-0.05), 2)
    assert has(found, "adafuse (router_input=embedding)", "minus.default.router_input", "gate_input")


def test_bypass_is_held_against_no_bypass(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=2)
    for penalty in (0.0, 0.3):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        study.write_study(tmp_path, {"adafuse": 0.65}, seeds=2, changes=changes, experiment="bypass")
    found = numbers(tmp_path)
    gap = shown(found, "adafuse (bypass_penalty=0.3)", "minus.adafuse", "bypass")
    assert gap["value"] == pytest.approx(-0.05)
    assert not has(found, "adafuse", "minus.adafuse")


def test_held_out_losses_are_paired_by_seed_over_the_same_domains(tmp_path: Path) -> None:
    for family, lost in (("copy", 0.1), ("sort", 0.3)):
        changes = {"data.name": "domain", "data.families": [family], "suite.tasks": [family]}
        for seed in range(3):
            for method, loss in (("lora", 0.5), ("adafuse", 0.5 + lost)):
                study.write_evaluation(tmp_path, method, 0.7, seed, changes=changes)
                # one domain's training is not there in the last seed
                if (family, seed, method) != ("sort", 2, "lora"):
                    study.write_fit(tmp_path, method, seed, changes=changes, loss=loss)
    found = numbers(tmp_path)
    gap = shown(found, "adafuse", "loss_minus.lora")
    assert (gap["value"], gap["n"], gap["reason"]) == (pytest.approx(0.2), 2, "t over 2 seeds")
    assert shown(found, "adafuse", "validation_loss")["value"] == pytest.approx(0.7)
    assert len(gap["records"].split()) == 8


def test_a_fit_of_other_settings_under_the_same_job_stands_behind_nothing(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7}, seeds=1, loss=0.5)
    study.write_fit(tmp_path, "lora", changes={"method.learning_rate_factor": 3.0}, loss=0.9)
    rows = of_headers(load([tmp_path]).records).assign(overrides="method=lora seed=0")
    assert shown(numbers(tmp_path, rows), "lora", "validation_loss")["value"] == pytest.approx(0.5)


def test_without_the_training_there_is_no_loss(tmp_path: Path) -> None:
    for method in ("lora", "adafuse"):
        study.write_evaluation(tmp_path, method)
        study.write_fit(tmp_path, method, changes={"train.steps": 7})
    found = numbers(tmp_path)
    assert not has(found, "adafuse", "loss_minus.lora") and not has(found, "adafuse", "validation_loss")


# -- through strategies


def write_generation(folder: Path, strategies: tuple[str, ...] = ("dense", "switch")) -> None:
    """In bf16 switch turns 4 of 100 items around; in fp16 it changes nothing."""
    for seed in range(2):
        for dtype in ("bfloat16", "float16"):
            for strategy in strategies:
                changes = {
                    "evaluate_dtype": dtype,
                    "evaluate_strategy": strategy,
                    "data.name": "long_answers",
                }
                flips = 4 if (strategy, dtype) == ("switch", "bfloat16") else 0
                study.write_evaluation(
                    folder, "adafuse", 1.0, seed, changes, flips=flips, experiment="generation"
                )


def test_strategies_are_held_against_dense_of_their_dtype(tmp_path: Path) -> None:
    write_generation(tmp_path)
    found = measured(tmp_path)
    assert rows_of(found, "generation") == [
        "dense bfloat16",
        "dense float16",
        "switch bfloat16",
        "switch float16",
    ]
    values = by_place(found)
    gap = shown(values, "switch bfloat16", "minus.dense", "generation")
    assert (gap["value"], gap["n"]) == (pytest.approx(-0.04), 2)
    counts = [
        shown(values, "switch bfloat16", name, "generation")["value"] for name in ("differing", "items")
    ]
    assert counts == [2 * 4 * 4, 2 * 4 * 100]
    assert shown(values, "switch bfloat16", "differing.sort", "generation")["value"] == 2 * 4
    assert shown(values, "switch float16", "differing", "generation")["value"] == 0
    assert not has(values, "dense bfloat16", "minus.dense", "generation")


def test_weights_that_are_never_put_right_are_held_against_dense_of_another_experiment(
    tmp_path: Path,
) -> None:
    write_generation(tmp_path)
    how = {"evaluate_strategy": "switch", "evaluate_restore": False, "evaluate_dtype": "bfloat16"}
    for seed in range(2):
        changes = how | {"data.name": "long_answers"}
        study.write_evaluation(
            tmp_path, "adafuse", 1.0, seed, changes, flips=10, experiment="generation_drift"
        )
    gap = shown(numbers(tmp_path), "switch bfloat16 (restored=False)", "minus.dense", "generation_drift")
    assert gap["value"] == pytest.approx(-0.1)


def test_without_dense_there_is_no_difference(tmp_path: Path) -> None:
    write_generation(tmp_path, ("switch", "rebase"))
    found = numbers(tmp_path)
    assert has(found, "switch bfloat16", "accuracy.average", "generation")
    assert not has(found, "switch bfloat16", "minus.dense", "generation")


# -- learning rates


def write_rates(folder: Path, seed: int, losses: dict[float, float], **how: Any) -> None:
    for factor, loss in losses.items():
        changes = {"method.learning_rate_factor": factor} | how
        study.write_fit(folder, "lora", seed, changes=changes, loss=loss, experiment="learning_rate")


def test_the_lowest_loss_is_best_and_the_study_says_what_it_used(tmp_path: Path) -> None:
    write_rates(tmp_path, 100, {0.3: 0.9, 1.0: 0.7, 3.0: 0.8})
    study.write_study(tmp_path, {"lora": 0.7}, seeds=1, changes={"method.learning_rate_factor": 3.0})
    found = numbers(tmp_path)
    told = {
        rate: shown(found, "lora", f"validation_loss.{rate}", "learning_rate")["value"]
        for rate in ("0.0003", "0.003")
    }
    assert told == {"0.0003": pytest.approx(0.9), "0.003": pytest.approx(0.8)}
    assert shown(found, "lora", "best_rate", "learning_rate")["value"] == pytest.approx(0.001)
    assert shown(found, "lora", "used_rate", "learning_rate")["value"] == pytest.approx(0.003)


def test_fits_behind_evaluations_choose_no_rate(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7}, seeds=2)
    assert not numbers(tmp_path).index.get_level_values("quantity").str.contains("rate").any()
