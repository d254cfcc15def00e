"""The paragraph of conclusions: it turns with the records, and says nothing that they do not carry."""

import re
from pathlib import Path

import pytest

import synthetic
import synthetic_gpu
import synthetic_study as study
from adafuse.records import load
from adafuse.report import find
from adafuse.report.conclusions import paragraphs
from test_generation import write as write_generation
from test_why import vary, write_bypass


def said(folder: Path) -> str:
    found = find(load([folder]))
    return paragraphs(found.latency, found.claims, found.trained)


def test_a_cpu_concludes_nothing_about_speed(tmp_path: Path) -> None:
    synthetic.write_latency(tmp_path)
    assert said(tmp_path) == ""


@pytest.mark.parametrize(
    ("factor", "verdict"), [(2.0, "replicated"), (0.75, "replicated in part"), (0.3, "not replicated")]
)
def test_the_claim_of_speed_has_the_verdict_of_the_rules(tmp_path: Path, factor: float, verdict: str) -> None:
    others = dict.fromkeys(("mola_loop", "pesc_loop", "moral_loop"), factor)
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, factors=others)
    text = said(tmp_path)
    assert f"times faster than other dynamic adapters) is {verdict}: AdaFuse's token is" in text
    assert "Of the paper's 10 claims about time there (judged by 8 of our numbers), " in text


def test_a_cost_within_the_noise_is_said_to_be_so(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, factors={"adafuse_switch": 0.74})
    assert "times the backbone's, which the A/A arm does not tell from 1." in said(tmp_path)
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64)
    assert "A/A" not in said(tmp_path)


def test_without_launches_merging_is_what_costs(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "twin")
    assert "the gain was in launches saved, not in merging." in said(tmp_path)
    assert "Of all its arms the fastest is AdaFuse (fused, graph): " in said(tmp_path)


@pytest.mark.parametrize(("factor", "above", "below"), [(1.3, 1, 0), (1.0, 0, 0), (0.7, 0, 1)])
def test_what_one_gate_saves_is_paired_within_each_cell(
    tmp_path: Path, factor: float, above: int, below: int
) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", factors={"adafuse_layerwise_gather_graph": factor})
    assert f"the interval lies above 1 in {above}, below in {below})" in said(tmp_path)


def test_the_two_sentences_on_speed_are_of_the_same_experts(tmp_path: Path) -> None:
    others = dict.fromkeys(("mola_loop", "pesc_loop", "moral_loop"), 3.0)
    synthetic_gpu.write_gpu_latency(tmp_path, "paper", context=64, factors=others)
    synthetic_gpu.write_gpu_latency(tmp_path, "twin")
    # more processes stand behind the higher rank
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", 64, processes=5, factors={"adafuse_switch_graph": 2.0})
    assert "merging into the weights costs 2.9" in said(tmp_path)


def test_merging_that_is_cheap_is_not_blamed(tmp_path: Path) -> None:
    synthetic_gpu.write_gpu_latency(tmp_path, "twin", factors={"adafuse_switch_graph": 0.3})
    assert "merging into the weights costs" in said(tmp_path) and "not in merging" not in said(tmp_path)
    assert "the fastest is AdaFuse (switch, graph)" in said(tmp_path)


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.70, "on par (mixture on tiny +0.0)"),
        (0.74, "better (mixture on tiny +4.0)"),
        (0.6, "worse (mixture on tiny -10.0)"),
    ],
)
def test_accuracy_on_the_mixture(tmp_path: Path, accuracy: float, words: str) -> None:
    methods = {"lora": 0.7, "adafuse_layerwise": 0.7, "adafuse": accuracy}
    study.write_study(tmp_path, methods, spread=0.001, items=1000)
    expected = f"Against a gate per layer, in points: {words}. Against plain LoRA, in points: {words}."
    assert expected in said(tmp_path)


def test_studies_stand_under_their_verdicts(tmp_path: Path) -> None:
    methods = {"lora": 0.7, "adafuse": 0.7}
    for family in ("copy", "sort"):
        changes = {"data.name": "domain", "data.families": [family], "suite.tasks": [family]}
        study.write_study(tmp_path, methods, spread=0.001, items=1000, changes=changes)
    study.write_study(tmp_path, methods, changes={"model.name": "other"})
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.6}, spread=0.001, items=1000)
    assert "on par (mixture on other +0.0, single families on tiny +0.0); worse (mixture on tiny" in said(
        tmp_path
    )


def test_a_verdict_that_hangs_on_one_family_is_said_to(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7})
    for seed in range(5):
        study.write_evaluation(tmp_path, "adafuse", 0.7, seed, tilt={"sort": 0.2})
    assert "better (mixture on tiny +5.0, but +0.0 and on par without sort)" in said(tmp_path)


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
    assert "falls behind a gate per layer: -9.0 [" in said(
        tmp_path
    ) and "(first_linear, backbone tiny)" in said(tmp_path)
    for index, value in enumerate(["embedding", "first_linear"]):
        nearer = {"method.router_input": value, "method.router_norm": True}
        study.write_study(tmp_path, {"adafuse": 0.78 + 0.01 * index}, changes=nearer, **how)
    (nearest,) = re.findall(r"nearest to it, chosen by its result, is at (\S+) ", said(tmp_path))
    assert -2 < float(nearest) < 0 and "adafuse (router_norm=True), backbone tiny)" in said(tmp_path)


@pytest.mark.parametrize(("factor", "words"), [(1.0, "saves next to nothing"), (0.8, "saves time")])
def test_what_accuracy_can_spare_is_held_against_what_it_saves(
    tmp_path: Path, factor: float, words: str
) -> None:
    write_bypass(tmp_path)
    assert "can be left" not in said(tmp_path), "no such times"
    own = {"model": synthetic_gpu.LLAMA, "experts": synthetic_gpu.experts(), "batch": 1, "context": 128}
    knobs = synthetic.config()["latency"]
    for number, share in enumerate((0.0, 0.25, 0.5)):
        plain = own | {"latency": knobs | {"bypass_share": share}}
        how = {"machine": synthetic_gpu.GPU, "name": f"share{number}", "plain": plain}
        factors = {"adafuse_switch_graph": factor if share else 1.0}
        synthetic.write_latency(tmp_path, 0, "twin", factors=factors, **how)
    text = said(tmp_path)
    assert "Of the tokens 20 % can be left to the backbone alone with a fall of 2 points ruled out" in text
    assert f"That {words}: with 25 % left so, times the backbone, the paper's switch " in text


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
