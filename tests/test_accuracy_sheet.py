"""The table of accuracy: verdicts, what carries them, routed methods, settings and layers, each from known numbers."""

from pathlib import Path

import pandas as pd
import pytest

import synthetic_study as study
from adafuse.records import load, open_record
from adafuse.report import accuracy_sheet, find, sheet
from adafuse.report.accuracy_sheet import AGREEMENT, CARRIED, DIFFERENCES, ROUTING, SETTINGS
from synthetic import run_fields

PER_LAYER, LORA, MOLA = "minus a gate per layer", "minus plain LoRA", "minus MoLA"
LATER = f"later seeds alone: {LORA}"
REST, REST_PER_LAYER = (f"{minus}, without one task" for minus in (LORA, PER_LAYER))
ENDS, ENDS_PER_LAYER = "furthest tasks to plain LoRA", "furthest tasks to a gate per layer"
LOSS, LOSS_PER_LAYER = (f"held-out loss, nats: {minus}" for minus in (LORA, PER_LAYER))
ROUTED = {"mola": 0.67, "moral": 0.6, "pesc": 0.65, "mixlora": 0.72, "adafuse": 0.69}


def drawn(folder: Path) -> sheet.Sheet:
    return accuracy_sheet.sheet(find(load([folder])).trained)


def cells(folder: Path, heading: str) -> list[dict[str, str]]:
    """The rows of one section as they are printed; none if it is not there."""
    (found,) = [s for s in drawn(folder).sections if s.heading == heading] or [sheet.nothing("")]
    rows = [row for row in found.rows if "reason" not in row]
    return [{name: show(row) for name, show in found.columns.items()} for row in rows]


@pytest.mark.parametrize(
    ("accuracy", "text"),
    [
        (0.70, "+0.0 [-0.2, +0.2] on par"),
        (0.74, "+4.0 [+3.8, +4.2] better"),
        (0.66, "-4.0 [-4.2, -3.8] worse"),
    ],
)
def test_the_verdict_stands_beside_the_difference(tmp_path: Path, accuracy: float, text: str) -> None:
    how = {"spread": 0.001, "items": 1000}
    study.write_study(tmp_path, {"lora": 0.7, "adafuse_layerwise": 0.71, "adafuse": accuracy}, **how)
    (row,) = cells(tmp_path, DIFFERENCES)
    assert row["study"] == "NVIDIA H200, tiny, mixture of 4 tasks, published sizes" and row["seeds"] == "5"
    assert row[LORA] == text and row[MOLA] == row[LATER] == "–"
    assert row[PER_LAYER].startswith(f"{100 * accuracy - 71:+.1f} [")


@pytest.mark.parametrize(("spread", "word"), [(0.01, "not worse"), (0.03, "not decided")])
def test_what_noise_leaves_open_has_its_own_word(tmp_path: Path, spread: float, word: str) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.705}, spread=spread, items=1000)
    (row,) = cells(tmp_path, DIFFERENCES)
    assert row[LORA].endswith(f"] {word}")


def test_a_cpu_is_called_so_and_one_adapter_a_family_too(tmp_path: Path) -> None:
    machine = study.GPU | {"name": "here", "gpu": None}
    for family in ("copy", "lookup"):
        changes = {"data.name": "domain", "data.families": [family], "suite.tasks": [family]}
        study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, changes=changes, machine=machine)
    (row,) = cells(tmp_path, DIFFERENCES)
    assert row["study"] == "CPU, tiny, 2 single families, published sizes"


def test_a_study_of_harder_items_is_told_apart(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, changes={"data.level": 3})
    (row,) = cells(tmp_path, DIFFERENCES)
    assert "mixture of 4 tasks at level 3, " in row["study"]


def test_both_ends_by_task_are_told(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7})
    for seed in range(5):
        study.write_evaluation(tmp_path, "adafuse", 0.7, seed, tilt={"sort": 0.2, "copy": -0.2})
    (row,) = cells(tmp_path, CARRIED)
    assert row[ENDS] == "-20.0 [-20.0, -20.0] (copy) to +20.0 [+20.0, +20.0] (sort)"
    assert row[ENDS_PER_LAYER] == row[REST_PER_LAYER] == "–"


def test_one_task_may_carry_the_mean_against_either_opponent(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse_layerwise": 0.68})
    for seed in range(5):
        study.write_evaluation(tmp_path, "adafuse", 0.71, seed, tilt={"sort": -0.25})
    (whole,), (row,) = cells(tmp_path, DIFFERENCES), cells(tmp_path, CARRIED)
    assert whole[LORA].endswith("worse") and whole["study"] == row["study"]
    assert row[REST].endswith("worse (copy) to +1.0 [+1.0, +1.0] on par (sort)")
    assert row[REST_PER_LAYER].endswith("worse (copy) to +3.0 [+3.0, +3.0] better (sort)")
    assert row[ENDS_PER_LAYER] == "-22.0 [-22.0, -22.0] (sort) to +3.0 [+3.0, +3.0] (copy)"


def test_held_out_loss_is_paired_by_seed(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse_layerwise": 0.7, "adafuse": 0.7}, loss=0.5)
    for path in (tmp_path / "train").glob("adafuse-s*"):
        path.unlink()
    for seed in range(5):
        path = study.write_fit(tmp_path, "adafuse", seed, loss=0.6 + 0.01 * (seed - 2))
    (row,) = cells(tmp_path, CARRIED)
    # t of four degrees of freedom times the standard error of five seeds 0.01 apart
    assert row[LOSS] == row[LOSS_PER_LAYER] == "+0.100 [+0.080, +0.120]"
    path.unlink()
    (row,) = cells(tmp_path, CARRIED)
    assert row[LOSS] == row[LOSS_PER_LAYER] == "–", "four seeds do not decide"


def test_seeds_beyond_the_first_five_stand_alone(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.75}, seeds=9)
    assert cells(tmp_path, DIFFERENCES)[0][LATER] == "–", "four do not decide"
    for seed in range(9, 12):
        study.write_evaluation(tmp_path, "lora", 0.7, seed)
        study.write_evaluation(tmp_path, "adafuse", 0.63, seed)
    (row,) = cells(tmp_path, DIFFERENCES)
    # four of the seven lie five points higher, three seven points lower
    assert row["seeds"] == "12" and row[LATER].startswith("-0.1 [") and row[LATER].endswith("] not decided")


def test_a_cell_of_fewer_seeds_than_its_row_says_so(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, seeds=12)
    study.write_study(tmp_path, {"adafuse_layerwise": 0.7}, seeds=11)
    study.write_study(tmp_path, {"mola": 0.7}, seeds=4)
    (row,) = cells(tmp_path, DIFFERENCES)
    assert row["seeds"] == "12" and row[LORA] == "+0.0 [+0.0, +0.0] on par" and row[MOLA] == "–"
    assert row[PER_LAYER] == "+0.0 [+0.0, +0.0] on par (11 seeds)" and row[LATER].endswith("on par")
    assert row[f"later seeds alone: {PER_LAYER}"] == "+0.0 [+0.0, +0.0] on par (6 seeds)"


def test_every_routed_method_is_held_against_one_lora(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, **ROUTED})
    assert cells(tmp_path, ROUTING) == [], "the twin is missing"
    study.write_study(tmp_path, {"adafuse_layerwise": 0.68}, seeds=4)
    assert cells(tmp_path, ROUTING) == [], "four seeds of the twin"
    study.write_study(tmp_path, {"adafuse_layerwise": 0.68})
    (row,) = cells(tmp_path, ROUTING)
    assert list(row) == ["study", "seeds", *accuracy_sheet.ROUTED]
    assert row["mola"] == "-3.0 [-3.0, -3.0]" and row["moral"] == "-10.0 [-10.0, -10.0]"
    assert row["mixlora"] == "+2.0 [+2.0, +2.0]" and row["adafuse_layerwise"] == "-2.0 [-2.0, -2.0]"


def test_the_distance_to_a_gate_per_layer_over_a_setting(tmp_path: Path) -> None:
    for rank, twin in ((4, 0.68), (8, 0.70), (16, 0.73)):
        changes = {"experts.rank": rank}
        study.write_study(tmp_path, {"adafuse": 0.70, "adafuse_layerwise": twin}, changes=changes)
    (row,) = cells(tmp_path, SETTINGS)
    assert row == {
        "setting": "rank of an expert",
        "where": "NVIDIA H200, tiny, data mixture",
        "points at each value": (
            "4: +2.0 [+2.0, +2.0]; 8: +0.0 [+0.0, +0.0]; 16: -3.0 [-3.0, -3.0]; 5 seeds each"
        ),
        "unlike the methods' files": "–",
    }


def test_points_of_unlike_seeds_and_settings_say_so(tmp_path: Path) -> None:
    for top_k, seeds in ((1, 5), (2, 7), (4, 4)):
        changes = {"experts.top_k": top_k, "method.normalisation": "softmax_topk_raw"}
        study.write_study(tmp_path, {"adafuse": 0.7, "adafuse_layerwise": 0.7}, seeds, changes=changes)
    (row,) = cells(tmp_path, SETTINGS)
    assert row["points at each value"] == "1: +0.0 [+0.0, +0.0] (5 seeds); 2: +0.0 [+0.0, +0.0] (7 seeds)", (
        "the four seeds at 4 do not count"
    )
    assert row["unlike the methods' files"] == "normalisation=softmax_topk_raw"


def test_one_point_is_no_setting(tmp_path: Path) -> None:
    for rank, seeds in ((4, 5), (8, 4)):
        changes = {"experts.rank": rank}
        study.write_study(tmp_path, {"adafuse": 0.7, "adafuse_layerwise": 0.7}, seeds, changes=changes)
    assert cells(tmp_path, SETTINGS) == []


def test_agreement_between_layers(tmp_path: Path) -> None:
    study.write_fit(tmp_path, "adafuse_layerwise", information=0.25)
    assert [section.heading for section in drawn(tmp_path).sections] == [AGREEMENT]
    path = write_blocks(tmp_path / "blocks", within=0.5, between=0.15)
    study.write_fit(tmp_path / "blocks", "mola", information=0.75)
    (row,) = cells(tmp_path / "blocks", AGREEMENT)
    # of 56 pairs of the eight routers 8 lie within a block
    assert row == {
        "where": "NVIDIA H200, tiny, data mixture",
        "between layers": "20 %",
        "within a block": "50 %",
    }
    assert drawn(tmp_path / "blocks").sections[0].rows[0]["records"] == [f"train/{path.name}"]
    study.write_fit(tmp_path / "one", "adafuse", information=0.25)
    assert cells(tmp_path / "one", AGREEMENT) == [], "AdaFuse has one gate"


def write_blocks(folder: Path, within: float, between: float) -> Path:
    """A training run with a gate per layer whose routers tell more of each other inside a block."""
    blocks = [router.split(".")[2] for router in study.LAYERS]
    told = [[within if one == two else between for two in blocks] for one in blocks]
    for index in range(len(blocks)):
        told[index][index] = 1.0
    plain = study.study_config("adafuse_layerwise", task="train")
    path = folder / "train" / "blocks.jsonl"
    with open_record(path, run_fields("train", "blocks", plain, machine=study.GPU)) as record:
        for router in study.LAYERS:
            record.write(
                "routing", router=router, family="copy", load=[0.125] * 8, entropy_nats=1, bypassed=0
            )
        record.write("agreement", routers=study.LAYERS, information=told)
    return path


def test_the_same_weights_under_another_name_are_said_to_be_so(tmp_path: Path) -> None:
    for model in ("tiny", "tiny_again"):
        changes = {"model.name": model}
        study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, changes=changes, backbone="ab" * 32)
    for heading in (DIFFERENCES, CARRIED):
        one, two = cells(tmp_path, heading)
        assert one["study"].startswith("NVIDIA H200, tiny, mixture")
        assert two["study"].startswith("NVIDIA H200, tiny_again (the weights of tiny again), mixture")


@pytest.mark.parametrize("seeds", [0, 4])
def test_without_enough_seeds_the_reason_stands_alone(tmp_path: Path, seeds: int) -> None:
    study.write_pretraining(tmp_path)
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, seeds=seeds)
    (section,) = drawn(tmp_path).sections
    (row,) = section.rows
    assert row["reason"].startswith("no 5 seeds of AdaFuse") and row["records"] == []


def test_the_csv_holds_plain_numbers_and_every_row_its_records(tmp_path: Path) -> None:
    routed = ROUTED | {"adafuse_layerwise": 0.68}
    study.write_study(tmp_path, {"lora": 0.7, **routed}, information=0.25)
    for rank in (4, 16):
        changes = {"experts.rank": rank}
        study.write_study(tmp_path, {"adafuse": 0.7, "adafuse_layerwise": 0.68}, changes=changes)
    found = drawn(tmp_path)
    assert [section.heading for section in found.sections] == [
        DIFFERENCES,
        CARRIED,
        ROUTING,
        SETTINGS,
        AGREEMENT,
    ]
    (_, path) = sheet.write(found, tmp_path / "tables")
    table = pd.read_csv(path).set_index("section")
    assert table["records"].str.contains(".jsonl", regex=False).all()
    first = table.loc[DIFFERENCES]
    assert first["minus_lora"] == pytest.approx(-0.01) and first["minus_lora_low"] == pytest.approx(-0.01)
    assert first["minus_lora_verdict"] == "on par" and first["minus_lora_p_equivalence"] == 0
    names = first["records"].split("; ")
    assert len(names) == len(set(names)) == 20, "five seeds of AdaFuse and of each of three"
    assert table.loc[CARRIED, "loss_minus_lora"] == 0 and table.loc[ROUTING, "mola"] == pytest.approx(-0.03)
    assert table.loc[SETTINGS, "at_16"] == pytest.approx(0.02)
    assert table.loc[AGREEMENT, "between_layers"] == pytest.approx(0.25)
