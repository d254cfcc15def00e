"""What routers do: effective experts, collapse, what a choice tells, and whether layers agree; from known loads."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adafuse.archive import load
from adafuse.report import routing
from adafuse.report.frames import Frames, frames
from synthetic import study
from synthetic.report import edited

EVEN = [0.125] * 8


def one_of(experts: int, total: int = 8) -> list[float]:
    """As many equally loaded experts."""
    return [1 / experts] * experts + [0.0] * (total - experts)


def read(folder: Path) -> Frames:
    return frames(load([folder]).records)


def numbers(found: Frames) -> dict[tuple[str, str], pd.Series]:
    frame = routing.measure(found).values
    return {(line["row"], line["quantity"]): line for _, line in frame.iterrows()}


def test_families_with_experts_of_their_own_are_no_collapse(tmp_path: Path) -> None:
    loads = {"copy": one_of(2), "sort": [0.0] * 2 + one_of(2, 6)}
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=2, loads=loads)
    found = numbers(read(tmp_path))
    assert found["adafuse", "effective_experts"]["value"] == pytest.approx(4)
    assert found["adafuse", "effective_experts.copy"]["value"] == pytest.approx(2)
    assert (found["adafuse", "collapsed"]["value"], found["adafuse", "collapsed.copy"]["value"]) == (0, 1)
    assert found["adafuse", "tells_family"]["value"] == pytest.approx(1)
    assert found["adafuse", "effective_experts"]["n"] == 2 and found["adafuse", "routers"]["value"] == 1


def test_the_same_load_everywhere_tells_nothing(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"mola": 0.7, "lora": 0.7}, seeds=1, entropy=0.5, bypassed=0.25)
    found = numbers(read(tmp_path))
    assert found["mola", "tells_family"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["mola", "effective_experts"]["value"] == pytest.approx(8)
    assert found["mola", "entropy_nats"]["value"] == found["mola", "entropy_nats.copy"]["value"] == 0.5
    assert found["mola", "bypassed"]["value"] == 0.25
    assert found["mola", "routers"]["value"] == len(study.LAYERS)
    assert {row for row, _ in found} == {"mola"}


@pytest.mark.parametrize(("experts", "collapsed"), [(3, 1.0), (4, 0.0)])
def test_collapse_begins_a_quarter_of_the_way_from_top_k(
    tmp_path: Path, experts: int, collapsed: float
) -> None:
    """Top-2 of 8: fewer than 3.5 effective experts."""
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=1, loads={"copy": one_of(experts)})
    assert numbers(read(tmp_path))["adafuse", "collapsed"]["value"] == collapsed


def test_one_family_is_told_by_nothing(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=1, loads={"copy": EVEN})
    found = numbers(read(tmp_path))
    assert ("adafuse", "tells_family") not in found
    assert (
        found["adafuse", "effective_experts"]["value"] == found["adafuse", "effective_experts.copy"]["value"]
    )


def without_families(line: dict[str, Any]) -> None:
    if line["kind"] == "routing":
        del line["family"], line["bypassed"]


def test_older_lines_without_families_are_over_all(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=1, loads={"copy": one_of(4)})
    records = [edited(record, without_families) for record in load([tmp_path]).records]
    found = numbers(frames(records))
    assert {name for _, name in found} == {"effective_experts", "collapsed", "entropy_nats", "routers"}
    assert found["adafuse", "effective_experts"]["value"] == pytest.approx(4)


def test_a_family_without_any_chosen_expert_has_no_load(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.7}, seeds=1, loads={"copy": one_of(2), "sort": [0.0] * 8})
    used = routing.uses(read(tmp_path))
    found = numbers(read(tmp_path))
    assert found["adafuse", "effective_experts"]["value"] == pytest.approx(2)
    assert ("adafuse", "effective_experts.sort") not in found and ("adafuse", "bypassed.sort") in found
    assert list(routing.load_map(used, used.lines["record"].iloc[0]).index) == ["copy"]


def test_unequal_counts_of_experts_stand_side_by_side(tmp_path: Path) -> None:
    for count in (2, 8):
        how = {"changes": {"experts.count": count}, "loads": {"copy": one_of(count, count)}}
        study.write_study(tmp_path, {"adafuse": 0.7}, seeds=1, experiment="expert_count", **how)
    found = numbers(read(tmp_path))
    told = {row: line["value"] for (row, name), line in found.items() if name == "effective_experts"}
    assert told == {"adafuse (count=2)": pytest.approx(2), "adafuse (count=8)": pytest.approx(8)}


def test_agreement_is_the_mean_over_pairs_and_adapters(tmp_path: Path) -> None:
    for seed, information in enumerate((0.2, 0.4)):
        study.write_evaluation(tmp_path, "mola", seed=seed)
        study.write_fit(tmp_path, "mola", seed, information=information)
    found = read(tmp_path)
    told = numbers(found)
    for name in ("between_layers", "within_block"):
        assert told["mola", name]["value"] == pytest.approx(0.3) and told["mola", name]["n"] == 2
    routers, matrix = routing.agreement(found, told["mola", "between_layers"]["records"].split())
    assert routers == study.LAYERS and matrix[0, 1] == pytest.approx(0.3) and matrix[0, 0] == 1
    assert routing.agreement(found, ["none"]) is None


def test_routers_of_one_block_may_agree_more(tmp_path: Path) -> None:
    study.write_evaluation(tmp_path, "mola")
    study.write_fit(tmp_path, "mola", information=0.1)
    blocks = np.array(routing.blocks(study.LAYERS))
    assert list(blocks[:3]) == ["0", "0", "1"] and routing.blocks(["token"]) == ["token"]

    def more_in_blocks(line: dict[str, Any]) -> None:
        if line["kind"] == "agreement":
            line["information"] = np.where(blocks[:, None] == blocks, 0.5, 0.1).tolist()

    told = numbers(frames(edited(record, more_in_blocks) for record in load([tmp_path]).records))
    assert told["mola", "within_block"]["value"] == pytest.approx(0.5)
    # of the seven others one is of the same block
    assert told["mola", "between_layers"]["value"] == pytest.approx((0.5 + 6 * 0.1) / 7)


def test_figures_take_loads_by_family_and_what_each_router_tells(tmp_path: Path) -> None:
    loads = {"copy": one_of(2), "sort": [0.0] * 2 + one_of(2, 6)}
    for seed in range(2):
        study.write_evaluation(tmp_path, "mola", seed=seed)
        study.write_fit(tmp_path, "mola", seed, loads=loads if seed else {"copy": EVEN, "sort": EVEN})
    found = read(tmp_path)
    used = routing.uses(found)
    (fit,) = [key for key, run in found.runs.iterrows() if run["task"] == "train" and run["seed"] == 1]
    assert routing.load_map(used, fit).loc["sort"].tolist() == loads["sort"]
    told = used.routers["tells_family"].groupby(level="router", sort=False).mean()
    assert list(told.index) == study.LAYERS and told.tolist() == pytest.approx([0.5] * len(study.LAYERS))


def test_without_fits_there_is_nothing_to_say(tmp_path: Path) -> None:
    study.write_evaluation(tmp_path, "adafuse")
    assert routing.measure(read(tmp_path)).values.empty


def test_effective_number_counts_equal_loads() -> None:
    slots = pd.DataFrame([one_of(2), one_of(8), [0.0] * 8])
    assert np.exp(routing._entropy(slots))[:2].tolist() == pytest.approx([2, 8])
    assert math.isnan(routing._entropy(slots)[2])
