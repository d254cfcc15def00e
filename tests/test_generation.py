"""Accuracy by strategy: the same adapters and items, compared with dense in the same dtype."""

from pathlib import Path

import pytest

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find, sheet
from adafuse.report.generation import Gap, generation_table
from adafuse.stats import Difference, mean_interval


def write(folder: Path, seeds: int = 3, tasks: list[str] | None = None) -> None:
    """In bf16 switch turns 4 of 100 items around; in fp32 it changes nothing."""
    suite = {"suite.tasks": tasks} if tasks else {}
    for seed in range(seeds):
        for dtype in ("bfloat16", "float32"):
            for strategy in ("switch", "dense", "rebase"):
                changes = {"evaluate_strategy": strategy, "evaluate_dtype": dtype, "suite.name": "long"}
                changes |= suite
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
    assert (switched["differing"], switched["items"]) == (48, 1200) and switched["to_dense"].n_seeds == 3
    assert switched["to_dense"].value == pytest.approx(
        switched["average"] - rows["dense", "bfloat16"]["average"]
    )
    assert rows["switch", "float32"]["differing"] == 0 == rows["rebase", "bfloat16"]["to_dense"].value
    shown = {name: show(rows["dense", "bfloat16"]) for name, show in section.columns.items()}
    assert shown["minus dense [95 %]"] == "–" and "recital minus dense [95 %]" not in shown
    assert section.columns["minus dense [95 %]"](rows["switch", "float32"]) == "0 of 1,200 items differ"
    assert section.columns["minus dense [95 %]"](switched).endswith("] points, 48 of 1,200 items differ")
    assert section.notes[0].startswith("Tasks: copy (acc, 100 items), sort (acc, 100 items)")


def test_the_long_family_has_a_column_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, tasks=["copy", "recital"])
    (section,) = table(tmp_path).sections
    (switched,) = [row for row in section.rows if (row["strategy"], row["dtype"]) == ("switch", "bfloat16")]
    assert (switched["differing"], switched["items"]) == (24, 600)
    assert (switched["recital_differing"], switched["recital_items"]) == (12, 300)
    assert section.columns["recital minus dense [95 %]"](switched).endswith("12 of 300 items differ")


@pytest.mark.parametrize(
    ("by_seed", "words"),
    [
        ((0.01, 0.03), "+2.0 [-10.7, +14.7] points, 3 of 100 items differ"),
        ((0.0, 0.0), "3 of 100 items differ"),
        ((-0.03, -0.03), "-3.0 points in every seed, 3 of 100 items differ"),
    ],
)
def test_an_interval_without_width_is_no_interval(by_seed: tuple[float, float], words: str) -> None:
    centre, low, high = mean_interval(by_seed)
    found = Gap(Difference(centre, low, high, 2, 50, "t over 2 seeds", by_seed), 3, 100)
    assert found.text == words


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
    rows = {row["strategy"]: row["differing"] for row in section.rows if row["dtype"] == "bfloat16"}
    assert rows == {"dense": 0, "rebase": 0, "switch": 48, "switch, never put right": 96}


def test_one_strategy_is_no_comparison(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=2)
    assert "experiment=generation" in sheet.markdown(table(tmp_path))


def test_without_dense_there_is_no_difference(tmp_path: Path) -> None:
    for strategy in ("switch", "rebase"):
        study.write_evaluation(tmp_path, changes={"evaluate_strategy": strategy})
    rows = table(tmp_path).sections[0].rows
    assert [row["to_dense"] for row in rows] == [None, None] == [row["differing"] for row in rows]
    assert table(tmp_path).sections[0].columns["minus dense [95 %]"](rows[0]) == "–"
