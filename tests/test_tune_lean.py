"""scripts/tune_lean.py: a line for each cut, none measured twice, and the fastest as an entry of the table."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from adafuse.kernels import config
from adafuse.kernels.config import AttendCut, LeanCut
from synthetic.configurations import ROOT, compose

CUTS = [LeanCut(64, 32, 1, 1, 16), LeanCut(32, 32, 1, 1, 16)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_lean", ROOT / "scripts/tune_lean.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "cuts", lambda *_: CUTS)
    monkeypatch.setattr(module, "attend_cuts", lambda *_: [AttendCut(16, 2, 16, 1)])
    monkeypatch.setattr(module.calibration, "calibrate", lambda where: {"read_gbps": 10.0})
    for name, value in {"CONTEXTS": (20,), "REPLAYS": 1, "BLOCKS": 1, "TOKENS": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def settings(script: ModuleType, arm: str = "base_lean"):
    small = ["hidden_size=64", "intermediate_size=64", "num_hidden_layers=1", "vocab_size=300"]
    shape = [f"model.shape.{change}" for change in small]
    arms = [f"arms.run=[{arm}]", "task=latency", "device=cpu", "context=12"]
    return compose("profile=gpu", "model=tiny", "model.weights=random", "model.dtype=float32", *arms, *shape)


def test_cuts_are_measured_once_and_the_fastest_stays(
    script: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "lines.jsonl"
    own = settings(script)
    script.sweep(own, ["out", "attend"], script.Notes(out, 100.0, "cpu"))
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [line.get("part") for line in lines] == [None, "out", "out", "attend"]
    assert all(line["gbps"] >= 0 and line["us"] > 0 for line in lines[1:]), lines
    again = script.Notes(out, 100.0, "cpu")
    script.sweep(own, ["out", "attend"], again)
    assert len(again.lines) == len(lines)
    fastest = min(lines[1:3], key=lambda line: line["us"])
    assert again.best() == {(1, 64, 64, "none"): next(cut for cut in CUTS if cut.rows == fastest["rows"])}
    with_experts = settings(script, "adafuse_gather_lean")
    script.sweep(with_experts, ["out"], again)
    assert {line["experts"] for line in again.lines if "experts" in line} == {"none", "known"}
    assert len(again.best()) == 2 and all("error" not in line for line in again.lines)
    launched, launch = [], script.lean.product
    monkeypatch.setattr(script.lean, "product", lambda work: (launched.append(work.cut), launch(work)))
    for number in range(2):
        script.sweep(own, ["out"], script.Share(tmp_path / "none.jsonl", number, 2))
    assert sorted(cut.rows for cut in launched) == sorted(cut.rows for cut in CUTS), "each by one of two"
    script.sweep(own, ["out"], script.Share(out, 0, 1))
    assert len(launched) == len(CUTS), "none that has a line"
    late = script.Notes(tmp_path / "other.jsonl", 0.0, "cpu")
    script.sweep(own, ["out"], late)
    assert len(late.lines) == 1, "nothing new begins when the time is over"


def test_a_step_is_timed_with_the_fastest_cuts(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(config, "LEAN_CUTS", {})
    monkeypatch.setattr(script.config, "LEAN_CUTS", config.LEAN_CUTS)
    out = tmp_path / "lines.jsonl"
    known = {"tokens": 1, "inputs": 64, "experts": "none", "us": 1.0, **vars(CUTS[0])}
    parts = [{"part": "out", "outputs": 64}, {"part": "head", "outputs": 300, "rows": 512}]
    lines = [{"read_gbps": 10.0}, *(known | part for part in parts)]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script.steps(settings(script), script.Notes(out, 100.0, "cpu"))
    steps = [json.loads(text) for text in out.read_text().splitlines()][3:]
    assert [(line["arm"], line["early"]) for line in steps] == [("base_lean", True), ("base_lean", False)]
    assert all(line["ms"] > 0 for line in steps)
    assert config.lean_cut(1, 64, 64, False, "none") == CUTS[0]


def test_mistakes_are_one_line(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["tiny", "1", "qkv,nonesuch"]) == 2
    assert capsys.readouterr().err == "error: there is no part nonesuch: see --help\n"


def test_what_is_tried_fits_a_multiprocessor(script: ModuleType) -> None:
    fresh = importlib.util.module_from_spec(script.__spec__)
    script.__spec__.loader.exec_module(fresh)
    for tokens, gated in ((1, False), (2, True), (8, False), (64, True)):
        tried = fresh.cuts(tokens, gated, False)
        assert 5 <= len(tried) <= 48
        assert tokens <= 2 or all(cut.rows >= (32 if gated else 16) for cut in tried)
    assert fresh.attend_cuts(1, 32)
