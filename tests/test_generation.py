"""Accuracy by strategy: the same adapters and items, compared with dense in the same dtype."""

from pathlib import Path

import pytest

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find, sheet
from adafuse.report.generation import generation_table


def write(folder: Path, seeds: int = 3) -> None:
    """In bf16 switch turns 4 of 100 items around; in fp32 it changes nothing."""
    for seed in range(seeds):
        for dtype in ("bfloat16", "float32"):
            for strategy in ("switch", "dense", "rebase"):
                changes = {"evaluate_strategy": strategy, "evaluate_dtype": dtype, "suite.name": "long"}
                flips = 4 if (strategy, dtype) == ("switch", "bfloat16") else 0
                study.write_evaluation(folder, seed=seed, changes=changes, flips=flips)


def table(folder: Path) -> sheet.Sheet:
    return generation_table(find(load([folder])).trained.generated)


def test_rows_are_compared_with_dense_of_their_dtype(tmp_path: Path) -> None:
    write(tmp_path)
    (section,) = table(tmp_path).sections
    rows = {(row["strategy"], row["dtype"]): row for row in section.rows}
    assert list(rows) == [(s, d) for d in ("bfloat16", "float32") for s in ("dense", "rebase", "switch")]
    switched = rows["switch", "bfloat16"]
    assert switched["same"] == pytest.approx(0.96) and switched["to_dense"].n_seeds == 3
    assert switched["to_dense"].value == pytest.approx(
        switched["average"] - rows["dense", "bfloat16"]["average"]
    )
    assert rows["switch", "float32"]["same"] == 1 and rows["rebase", "bfloat16"]["to_dense"].value == 0
    shown = {name: show(rows["dense", "bfloat16"]) for name, show in section.columns.items()}
    assert shown["minus dense [95 %]"] == shown["same result as dense"] == "–"


def test_methods_have_sections_of_their_own(tmp_path: Path) -> None:
    write(tmp_path)
    for strategy in ("dense", "gather"):
        changes = {"evaluate_strategy": strategy, "suite.name": "long"}
        study.write_evaluation(tmp_path, "lora", changes=changes)
    assert [s.heading.split(":")[0] for s in table(tmp_path).sections] == ["lora", "adafuse"]


def test_a_suite_for_generation_alone_is_no_section_of_table_2(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, seeds=2)
    write(tmp_path)
    found = find(load([tmp_path])).trained
    assert len(found.studies) == 1 and list(found.studies[0].variants) == ["lora", "adafuse"]


def test_weights_that_are_never_put_right_are_a_row_of_their_own(tmp_path: Path) -> None:
    write(tmp_path)
    for seed in range(3):
        changes = {"evaluate_strategy": "switch", "evaluate_dtype": "bfloat16", "suite.name": "long"}
        study.write_evaluation(tmp_path, seed=seed, changes=changes | {"evaluate_restore": False}, flips=8)
    (section,) = table(tmp_path).sections
    rows = {row["strategy"]: row["same"] for row in section.rows if row["dtype"] == "bfloat16"}
    assert rows == {"dense": 1, "rebase": 1, "switch": 0.96, "switch, never put right": 0.92}


def test_one_strategy_is_no_comparison(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=2)
    assert "experiment=generation" in sheet.markdown(table(tmp_path))


def test_without_dense_there_is_no_difference(tmp_path: Path) -> None:
    for strategy in ("switch", "rebase"):
        study.write_evaluation(tmp_path, changes={"evaluate_strategy": strategy})
    rows = table(tmp_path).sections[0].rows
    assert [row["to_dense"] for row in rows] == [None, None] == [row["same"] for row in rows]
