"""Sentences about trained adapters: the numbers of the tables in plain words, and nothing without records."""

from pathlib import Path

import pytest

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find
from adafuse.report.findings_accuracy import sentences
from adafuse.report.findings_why import spared
from adafuse.report.fits import Fits
from adafuse.report.knobs import BYPASS
from adafuse.report.why_studies import Why
from test_generation import write as write_generation
from test_why import vary, write_bypass


def said(folder: Path) -> list[str]:
    return sentences(find(load([folder])).trained)


def test_the_best_gate_input_is_ahead_of_the_next(tmp_path: Path) -> None:
    vary(tmp_path, {"adafuse": 0.7}, "method.router_input", ["embedding", "first_linear", "block0_output"])
    (line,) = said(tmp_path)
    assert "first_linear 71.0 %, embedding 70.0 %, block0_output 72.0 %" in line
    assert "block0_output is +1.0 [+1.0, +1.0] points ahead of first_linear" in line


def test_methods_beside_the_gate_input_are_said(tmp_path: Path) -> None:
    vary(tmp_path, {"adafuse": 0.7}, "method.router_input", ["embedding", "first_linear"], seeds=1)
    study.write_study(tmp_path, {"lora": 0.72, "base": 0.3}, seeds=1)
    (line,) = said(tmp_path)
    assert "; beside it base 30.0 %, lora 72.0 % (AdaFuse at its best place minus plain LoRA: -1.0 [" in line


def write_places(folder: Path, entropies: tuple[float, float], changes: dict | None = None) -> None:
    """AdaFuse at two places: 70 % at the embedding, 71 % at the first linear."""
    for accuracy, place, entropy in zip((0.70, 0.71), ("embedding", "first_linear"), entropies, strict=True):
        own = {"method.router_input": place} | (changes or {})
        study.write_study(folder, {"adafuse": accuracy}, changes=own, entropy=entropy)


def test_how_soft_the_gates_are_is_said_of_each_place(tmp_path: Path) -> None:
    write_places(tmp_path / "one", (0.5, 1.5))
    (line,) = said(tmp_path / "one")
    assert "as well: first_linear 1.50, embedding 0.50 nats, at most 2.08; accuracy follows it" in line
    write_places(tmp_path / "other", (1.5, 0.5))
    (line,) = said(tmp_path / "other")
    assert "embedding 1.50 nats, at most 2.08." in line and "accuracy follows it" not in line


def test_a_line_with_experts_in_fewer_layers_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    write_places(tmp_path, (1.0, 1.0))
    late_changes = {"method.first_expert_block": 1}
    write_places(tmp_path, (1.0, 1.0), late_changes)
    write_places(tmp_path, (1.0, 1.0), late_changes | {"method.router_norm": True})
    study.write_study(tmp_path, {"lora": 0.72}, seeds=5)
    plain, late, normed = [line for line in said(tmp_path) if "Where the gate looks" in line]
    assert "data mixture): " in plain and "beside it lora" in plain
    assert "**Where the gate looks, no experts before block 1**" in late
    assert "data mixture): first_linear 71.0 %" in late
    assert "lora" not in late
    assert "**Where the gate looks, inputs at one scale, no experts before block 1**" in normed


def test_the_share_that_may_skip_before_it_costs_the_margin(tmp_path: Path) -> None:
    write_bypass(tmp_path)
    (line,) = said(tmp_path)
    assert "20 % of the tokens can be left to the backbone alone (penalty 0)" in line
    assert (
        "with a fall of 2 points ruled out: +0.0 points, 90 % interval [+0.0, +0.0]; measured up to 60 %"
        in line
    )


def test_a_bypass_that_costs_at_once_is_said(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.70})
    changes = {"method.null_expert": True, "method.bypass_penalty": 0.5}
    study.write_study(tmp_path, {"adafuse": 0.6}, bypassed=0.1, changes=changes)
    (line,) = said(tmp_path)
    assert "already 10 % of the tokens (penalty 0.5) cost -10.0" in line


def bypass_study(folder: Path) -> tuple[Why, Fits]:
    found = find(load([folder])).trained
    (why,) = [why for why in found.whys if why.knob.name == BYPASS]
    return why, found.fits


def test_the_largest_share_that_may_skip_with_its_penalty_and_cost(tmp_path: Path) -> None:
    write_bypass(tmp_path)
    changes = {"method.null_expert": True, "method.bypass_penalty": 0.05}
    study.write_study(tmp_path, {"adafuse": 0.69}, spread=0.01, bypassed=0.4, changes=changes)
    found = spared(*bypass_study(tmp_path))
    assert found is not None
    share, penalty, cost = found
    assert (share, penalty, cost.n_seeds) == (pytest.approx(0.4), 0.05, 5)
    assert cost.value == pytest.approx(-0.01)


def test_a_share_beyond_one_that_costs_the_margin_is_not_spared(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"adafuse": 0.70})
    for penalty, share, accuracy in ((0.5, 0.1, 0.6), (0.1, 0.4, 0.7)):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        study.write_study(tmp_path, {"adafuse": accuracy}, bypassed=share, changes=changes)
    assert spared(*bypass_study(tmp_path)) is None, "the least share already costs ten points"


def test_accuracy_itself_stands_in_its_table_alone(tmp_path: Path) -> None:
    routed = ("lora", "mola", "moral", "pesc", "mixlora", "adafuse", "adafuse_layerwise")
    study.write_study(tmp_path, dict.fromkeys(routed, 0.7), information=0.25)
    assert said(tmp_path) == []


def test_drift_in_answers_by_dtype(tmp_path: Path) -> None:
    write_generation(tmp_path, tasks=["copy", "recital"])
    (line,) = said(tmp_path)
    assert (
        "against unmerged experts (in brackets recital alone, whose answers are long), rebase in bfloat16"
        in line
    )
    assert "24 of 600 items differ (" in line and "12 of 300 items differ);" in line
    assert line.endswith("switch in float32 0 of 600 items differ (0 of 300 items differ).")
    assert "[+0.0, +0.0]" not in line


def test_without_the_long_family_nothing_stands_in_brackets(tmp_path: Path) -> None:
    write_generation(tmp_path)
    (line,) = said(tmp_path)
    assert "recital" not in line and line.endswith("switch in float32 0 of 1,200 items differ.")
