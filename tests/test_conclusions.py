"""The paragraph of conclusions: it turns with the records, and says nothing that they do not carry."""

from pathlib import Path

import pytest

import synthetic
import synthetic_gpu
import synthetic_study as study
from adafuse.records import load
from adafuse.report import find
from adafuse.report.conclusions import paragraphs
from test_generation import write as write_generation
from test_why import vary


def said(folder: Path) -> str:
    found = find(load([folder]))
    return paragraphs(found.latency, found.trained)


def test_a_cpu_concludes_nothing_about_speed(tmp_path: Path) -> None:
    synthetic.write_latency(tmp_path)
    assert said(tmp_path) == ""


@pytest.mark.parametrize(("factor", "verdict"), [(2.0, "holds"), (1.0, "does not hold")])
def test_the_claim_of_speed_holds_or_not(tmp_path: Path, factor: float, verdict: str) -> None:
    others = dict.fromkeys(("mola_loop", "pesc_loop", "moral_loop"), factor)
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, factors=others)
    assert f"the paper's claim of speed {verdict}" in said(tmp_path)


@pytest.mark.parametrize(
    ("factors", "ends"),
    [
        ({}, "nor in the shared gate; gathered experts in a graph are what to deploy."),
        ({"adafuse_layerwise_gather_graph": 1.3}, "the gain was in launches saved, not in merging."),
    ],
)
def test_without_launches_merging_is_what_costs(tmp_path: Path, factors: dict, ends: str) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", factors=factors)
    assert said(tmp_path).endswith(ends)


def test_the_two_sentences_on_speed_are_of_the_same_experts(tmp_path: Path) -> None:
    others = dict.fromkeys(("mola_loop", "pesc_loop", "moral_loop"), 3.0)
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, factors=others)
    synthetic_gpu.write_gpu_latency(tmp_path, "twin")
    # more processes stand behind the higher rank
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", 64, processes=5, factors={"adafuse_switch_graph": 2.0})
    assert "merging into the weights costs 2.9" in said(tmp_path)


def test_nothing_is_recommended_where_merging_is_cheap(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", factors={"adafuse_switch_graph": 0.3})
    assert "merging into the weights costs" in said(tmp_path) and "deploy" not in said(tmp_path)


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.70, "on par (mixture on tiny +0.0)"),
        (0.74, "better than on par (mixture on tiny +4.0)"),
        (0.6, "worse (mixture on tiny -10.0)"),
    ],
)
def test_accuracy_on_the_mixture(tmp_path: Path, accuracy: float, words: str) -> None:
    methods = {"lora": 0.7, "adafuse_layerwise": 0.7, "adafuse": accuracy}
    study.write_study(tmp_path, methods, spread=0.001, items=1000)
    assert f"against plain LoRA, {words}; against its twin with a gate per layer, {words}." in said(tmp_path)


def test_studies_stand_under_their_verdicts(tmp_path: Path) -> None:
    methods = {"lora": 0.7, "adafuse": 0.7}
    for family in ("copy", "sort"):
        changes = {"data.name": "domain", "data.families": [family], "suite.tasks": [family]}
        study.write_study(tmp_path, methods, spread=0.001, items=1000, changes=changes)
    study.write_study(tmp_path, methods, changes={"model.name": "other"})
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.6}, spread=0.001, items=1000)
    assert "on par (mixture on other +0.0, single families on tiny +0.0), worse (mixture on tiny" in said(
        tmp_path
    )


def test_the_furthest_task_is_named(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7})
    for seed in range(5):
        study.write_evaluation(tmp_path, "adafuse", 0.7, seed, tilt={"sort": 0.2, "copy": -0.1})
    ends = "from -10 (copy, mixture on tiny) to +20 (sort, mixture on tiny) points."
    assert said(tmp_path).endswith(ends)


def test_the_same_weights_again_are_not_concluded_from(tmp_path: Path) -> None:
    methods = {"lora": 0.7, "adafuse_layerwise": 0.7, "adafuse": 0.7}
    for model in ("tiny", "tiny_again"):
        study.write_study(tmp_path, methods, changes={"model.name": model}, backbone="ab" * 32)
    assert "mixture on tiny " in said(tmp_path) and "tiny_again" not in said(tmp_path)


def test_a_few_seeds_conclude_nothing(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse_layerwise": 0.7, "adafuse": 0.6}, seeds=4)
    assert said(tmp_path) == ""


def test_one_decision_falls_behind_where_tokens_are_the_same(tmp_path: Path) -> None:
    how = {"spread": 0.001, "items": 1000}
    vary(tmp_path, {"adafuse": 0.7}, "method.router_input", ["embedding", "first_linear"], **how)
    study.write_study(tmp_path, {"adafuse_layerwise": 0.71}, items=1000)
    assert "falls behind" not in said(tmp_path), "the best gate reaches it"
    for folder in tmp_path.iterdir():
        for path in folder.glob("*"):
            path.unlink()
    vary(tmp_path, {"adafuse": 0.7}, "method.router_input", ["embedding", "first_linear"], **how)
    study.write_study(tmp_path, {"adafuse_layerwise": 0.8}, items=1000)
    assert "falls behind: -9.0 [" in said(tmp_path) and "(first_linear, backbone tiny)" in said(tmp_path)


def test_rounding_in_answers(tmp_path: Path) -> None:
    write_generation(tmp_path, seeds=5)
    assert said(tmp_path) == "", "these were put right after each answer"
    for seed in range(5):
        changes = {
            "evaluate_strategy": "switch",
            "evaluate_dtype": "bfloat16",
            "evaluate_restore": False,
            "suite.name": "long",
        }
        study.write_evaluation(tmp_path, seed=seed, changes=changes, flips=0)
    assert "does not show in answers (backbone tiny): +0.0" in said(tmp_path)
