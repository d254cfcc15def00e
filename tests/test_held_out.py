"""The paired held-out loss: one value a seed, the mean over its domains, and only where both learnt the same."""

import math
from pathlib import Path

import pytest

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find
from adafuse.report.held_out import loss_difference, loss_text
from adafuse.stats import Difference


def difference(folder: Path) -> Difference | None:
    found = find(load([folder])).trained
    (own,) = found.studies
    return loss_difference(own.variants["adafuse"], own.variants["lora"], found.fits)


def write_domain(folder: Path, family: str, seed: int, adafuse: float, lora: float) -> None:
    changes = {"data.name": "domain", "data.families": [family], "suite.tasks": [family]}
    for method, loss in (("adafuse", adafuse), ("lora", lora)):
        study.write_evaluation(folder, method, seed=seed, changes=changes)
        study.write_fit(folder, method, seed, changes, loss=loss)


def test_a_seed_is_the_mean_over_its_domains(tmp_path: Path) -> None:
    for seed, more in ((0, 0.0), (1, 0.2)):
        write_domain(tmp_path, "copy", seed, 0.9 + more, 0.5)
        write_domain(tmp_path, "sort", seed, 0.3, 0.5)
    found = difference(tmp_path)
    assert found and found.by_seed == pytest.approx((0.1, 0.2)) and found.n_seeds == 2
    assert found.value == pytest.approx(0.15) and found.low < 0 < found.high


def test_a_seed_with_a_domain_less_does_not_count(tmp_path: Path) -> None:
    write_domain(tmp_path, "copy", 0, 0.9, 0.5)
    write_domain(tmp_path, "copy", 1, 0.7, 0.5)
    changes = {"data.name": "domain", "data.families": ["sort"], "suite.tasks": ["sort"]}
    study.write_evaluation(tmp_path, "lora", seed=1, changes=changes)
    study.write_fit(tmp_path, "lora", 1, changes, loss=0.1)
    found = difference(tmp_path)
    assert found and found.by_seed == pytest.approx((0.4,)) and math.isnan(found.low)
    assert loss_text(found) == "+0.400 (no interval)"


def test_another_backbone_is_not_compared(tmp_path: Path) -> None:
    for method, backbone in (("adafuse", "ab" * 32), ("lora", "cd" * 32)):
        study.write_evaluation(tmp_path, method, backbone=backbone)
        study.write_fit(tmp_path, method)
    assert difference(tmp_path) is None


def test_without_the_training_run_there_is_no_difference(tmp_path: Path) -> None:
    for method in ("adafuse", "lora"):
        study.write_evaluation(tmp_path, method)
    study.write_fit(tmp_path, "lora")
    assert difference(tmp_path) is None
