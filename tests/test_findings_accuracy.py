"""Sentences about accuracy: the numbers of the tables in plain words, and nothing without records."""

from pathlib import Path

import pytest

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find
from adafuse.report.findings_accuracy import sentences
from test_generation import write as write_generation
from test_why import vary, write_bypass


def said(folder: Path) -> list[str]:
    return sentences(find(load([folder])).trained)


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.70, "+0.0 [-0.2, +0.2] points to plain LoRA, on par (equivalence: p < 0.001, 5 seeds)"),
        (0.74, "+4.0 [+3.8, +4.2] points to plain LoRA, better than on par"),
        (0.66, "-4.0 [-4.2, -3.8] points to plain LoRA, worse"),
    ],
)
def test_the_verdict_in_plain_words(tmp_path: Path, accuracy: float, words: str) -> None:
    how = {"spread": 0.001, "items": 1000}
    study.write_study(tmp_path, {"lora": 0.7, "adafuse_layerwise": 0.7, "adafuse": accuracy}, **how)
    (line,) = said(tmp_path)
    assert words in line and "a gate per layer" in line and "MoLA" not in line
    assert line.startswith(
        "- **Accuracy** (NVIDIA H200, tiny, data mixture, published sizes, mean of 4 tasks)"
    )


def test_the_p_of_equivalence_stands_beside_on_par_alone(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.74}, spread=0.001, items=1000)
    (line,) = said(tmp_path)
    assert "better than on par (5 seeds)" in line and "equivalence" not in line


def test_what_the_mean_over_tasks_hides_is_said(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7})
    for seed in range(5):
        study.write_evaluation(tmp_path, "adafuse", 0.7, seed, tilt={"sort": 0.2, "copy": -0.2})
    (line,) = said(tmp_path)
    assert "+0.0 [+0.0, +0.0] points to plain LoRA, on par" in line
    assert "from -20.0 [-20.0, -20.0] (copy) to +20.0 [+20.0, +20.0] (sort)." in line


def test_every_routed_method_is_held_against_one_lora(tmp_path: Path) -> None:
    routed = {"mola": 0.67, "moral": 0.6, "pesc": 0.65, "mixlora": 0.72, "adafuse": 0.69}
    study.write_study(tmp_path, {"lora": 0.7, **routed})
    assert not any("Does routing pay" in line for line in said(tmp_path)), "the twin is missing"
    study.write_study(tmp_path, {"adafuse_layerwise": 0.68})
    (line,) = [line for line in said(tmp_path) if "Does routing pay" in line]
    assert "mola -3.0 [-3.0, -3.0], moral -10.0" in line and "adafuse_layerwise -2.0" in line


def test_the_distance_to_a_gate_per_layer_is_said_over_a_setting(tmp_path: Path) -> None:
    for rank, twin in ((4, 0.68), (8, 0.70), (16, 0.73)):
        changes = {"experts.rank": rank}
        study.write_study(tmp_path, {"adafuse": 0.70, "adafuse_layerwise": twin}, changes=changes)
    (line,) = [line for line in said(tmp_path) if "Over the rank" in line]
    assert "4: +2.0 [+2.0, +2.0], 8: +0.0 [+0.0, +0.0], 16: -3.0 [-3.0, -3.0]" in line


def test_too_few_seeds_say_nothing(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, seeds=4)
    assert said(tmp_path) == []


def test_the_best_gate_input_is_ahead_of_the_next(tmp_path: Path) -> None:
    vary(tmp_path, {"adafuse": 0.7}, "method.router_input", ["embedding", "first_linear", "block0_output"])
    (line,) = said(tmp_path)
    assert "first_linear 71.0 %, embedding 70.0 %, block0_output 72.0 %" in line
    assert "block0_output is +1.0 [+1.0, +1.0] points ahead of first_linear" in line


def test_methods_beside_the_gate_input_are_said(tmp_path: Path) -> None:
    vary(tmp_path, {"adafuse": 0.7}, "method.router_input", ["embedding", "first_linear"], seeds=1)
    study.write_study(tmp_path, {"lora": 0.72, "base": 0.3}, seeds=1)
    (line,) = said(tmp_path)
    assert "; beside it base 30.0 %, lora 72.0 % (the best of them minus it: -1.0 [" in line


def test_agreement_between_layers(tmp_path: Path) -> None:
    study.write_fit(tmp_path, "adafuse_layerwise", information=0.25)
    (line,) = said(tmp_path)
    assert "tell 0.25 of each other, of one block 0.25" in line


def test_the_share_that_may_skip_before_it_costs_the_margin(tmp_path: Path) -> None:
    write_bypass(tmp_path)
    (line,) = said(tmp_path)
    assert "20 % of the tokens can be left to the backbone alone (penalty 0)" in line
    assert "+0.0 points, 90 % interval [+0.0, +0.0]; measured up to 60 %" in line


def test_a_bypass_that_costs_at_once_is_said(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.70})
    changes = {"method.null_expert": True, "method.bypass_penalty": 0.5}
    study.write_study(tmp_path, {"adafuse": 0.6}, bypassed=0.1, changes=changes)
    (line,) = said(tmp_path)
    assert "already 10 % of the tokens (penalty 0.5) cost -10.0" in line


def test_drift_in_answers_by_dtype(tmp_path: Path) -> None:
    write_generation(tmp_path)
    (line,) = said(tmp_path)
    assert "switch in bfloat16" in line and "96.0 % of the results the same" in line
    assert "switch in float32 +0.0 [+0.0, +0.0] points, 100.0 %" in line


def test_seeds_beyond_the_first_five_are_said_alone(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.75}, seeds=9)
    assert "alone" not in said(tmp_path)[0], "four do not decide"
    for seed in range(9, 12):
        study.write_evaluation(tmp_path, "lora", 0.7, seed)
        study.write_evaluation(tmp_path, "adafuse", 0.63, seed)
    (line,) = said(tmp_path)
    # four of the seven lie five points higher, three seven points lower
    assert (
        "The seeds after the first 5 alone: -0.1 [" in line and "to plain LoRA, not decided. By task" in line
    )


def test_the_same_weights_under_another_name_are_said_to_be_so(tmp_path: Path) -> None:
    for model in ("tiny", "tiny_again"):
        changes = {"model.name": model}
        study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, changes=changes, backbone="ab" * 32)
    one, two = said(tmp_path)
    assert "the weights of tiny again" not in one
    assert two.startswith("- **Accuracy** (NVIDIA H200, tiny_again, data mixture, the weights of tiny again,")
