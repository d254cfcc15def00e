"""Rows by method: the file's own setting bears the plain name, others say in what they differ."""

from pathlib import Path

import pytest

import synthetic_study as study
from adafuse.identity import as_plain
from adafuse.records import Record, load
from adafuse.report.variants import as_its_file, method_file, overridden, variants
from conftest import METHODS, compose


def names(folder: Path) -> list[str]:
    return list(variants(load([folder])))


def test_the_files_setting_bears_the_plain_name(tmp_path: Path) -> None:
    for penalty in (0.1, 0.0):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        study.write_evaluation(tmp_path, changes=changes)
    study.write_evaluation(tmp_path, "lora")
    study.write_evaluation(tmp_path)
    assert names(tmp_path) == [
        "lora",
        "adafuse",
        "adafuse (bypass_penalty=0.1, null_expert=True)",
        "adafuse (null_expert=True)",
    ]


def test_an_only_setting_needs_no_brackets(tmp_path: Path) -> None:
    study.write_evaluation(tmp_path, changes={"method.router_input": "embedding"})
    (record,) = load([tmp_path])
    assert names(tmp_path) == ["adafuse"] and not as_its_file(record)


def test_two_settings_without_the_files_are_told_apart(tmp_path: Path) -> None:
    for point in ("block0_output", "embedding"):
        study.write_evaluation(tmp_path, changes={"method.router_input": point})
    assert names(tmp_path) == ["adafuse (router_input=block0_output)", "adafuse (router_input=embedding)"]


def test_what_a_budget_derives_is_no_setting_of_its_own(tmp_path: Path) -> None:
    study.write_evaluation(tmp_path, "mola", changes={"budget": "equal", "method.rank": 3})
    (record,) = load([tmp_path])
    assert as_its_file(record)
    study.write_evaluation(tmp_path, "mola", changes={"method.rank": 3})
    assert sum(map(as_its_file, load([tmp_path]))) == 1


@pytest.mark.parametrize("budget", ["published", "equal"])
@pytest.mark.parametrize("method", ["base", "full", *METHODS])
def test_composed_methods_are_as_their_files(method: str, budget: str) -> None:
    plain = as_plain(compose(f"method={method}", f"budget={budget}"))
    record = Record(Path("made.jsonl"), {"config": plain}, [], "ok")
    assert overridden(record) == {}


def test_an_override_is_seen(tmp_path: Path) -> None:
    plain = as_plain(compose("method=adafuse", "budget=equal", "method.balance_coefficient=0"))
    assert overridden(Record(tmp_path, {"config": plain}, [], "ok")) == {"balance_coefficient": 0.0}


@pytest.mark.parametrize("profile", ["cpu", "gpu", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_the_file_says_what_a_profile_composes(method: str, profile: str) -> None:
    composed = as_plain(compose(f"method={method}", f"profile={profile}").method)
    file = method_file(method, profile)
    assert "learning_rate_factor" in file
    assert {field: composed[field] for field in file} == file
