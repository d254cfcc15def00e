"""The training run behind an evaluation is found by what was trained and by its seed."""

from pathlib import Path

import synthetic_study as study
from adafuse.records import load
from adafuse.report.fits import behind, fits, validation_loss


def test_only_the_same_adapter_and_seed_stand_behind(tmp_path: Path) -> None:
    bypassed = {"method.null_expert": True}
    for seed in (0, 1):
        study.write_fit(tmp_path, seed=seed, loss=0.5 + seed)
    study.write_fit(tmp_path, loss=9.0, changes=bypassed)
    study.write_fit(tmp_path, "adafuse_layerwise", loss=9.0)
    study.write_evaluation(tmp_path, seed=1, changes={"evaluate_strategy": "switch", "suite.name": "long"})
    records = load([tmp_path])
    evaluated = [record for record in records if record.run["task"] == "evaluate"]
    (found,) = behind(evaluated, fits(records))
    assert validation_loss([found]) == 1.5


def test_a_level_that_is_older_than_the_setting_is_the_first(tmp_path: Path) -> None:
    study.write_fit(tmp_path)
    study.write_evaluation(tmp_path)
    fit, evaluation = sorted(load([tmp_path]), key=lambda record: record.run["task"] == "evaluate")
    del fit.run["config"]["data"]["level"], fit.run["config"]["budget"]
    assert behind([evaluation], fits([fit])) == [fit] and validation_loss([]) is None
