"""Learning rates: chosen on the pilot seed, each method's best, beside what its file says."""

from pathlib import Path

import synthetic_study as study
from adafuse.records import load
from adafuse.report.sheet import Section
from adafuse.report.tuning import tuning_table


def section(folder: Path) -> Section:
    (found,) = tuning_table(load([folder])).sections
    return found


def write(folder: Path, method: str, losses: dict[float, float], seed: int = 100) -> None:
    for factor, loss in losses.items():
        study.write_fit(folder, method, seed, {"method.learning_rate_factor": factor}, loss=loss)


def test_the_lowest_loss_is_best(tmp_path: Path) -> None:
    write(tmp_path, "adafuse", {1.0: 0.9, 0.3: 1.1, 3.0: 0.8})
    write(tmp_path, "lora", {1.0: 0.7, 3.0: 0.75})
    found = section(tmp_path)
    rows = {row["method"]: row for row in found.rows}
    assert list(rows) == ["lora", "adafuse"]
    assert (rows["adafuse"]["best"], rows["adafuse"]["file"]) == (3e-3, 1e-3)
    assert rows["lora"]["best"] == 1e-3 and len(rows["adafuse"]["records"]) == 3
    shown = [show(rows["lora"]) for show in found.columns.values()]
    assert shown == ["lora", "–", "0.700", "0.750", "0.001", "0.001"]


def test_study_seeds_and_other_settings_choose_nothing(tmp_path: Path) -> None:
    write(tmp_path, "adafuse", {1.0: 0.9, 3.0: 0.8}, seed=0)
    changes = {"method.learning_rate_factor": 3.0, "method.balance_coefficient": 0.0}
    study.write_fit(tmp_path, "adafuse", 100, changes)
    write(tmp_path, "adafuse", {1.0: 0.9})
    assert section(tmp_path).heading == "No records"
