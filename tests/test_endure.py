"""scripts/endure.py: every token of a long decode is held against a whole forward, and so are weights and memory."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from synthetic.scripts import script

SMALL = ["device=cpu", "model.dtype=float32", "model.shape.num_hidden_layers=2", "model.shape.hidden_size=32"]
SMALL += ["model.shape.intermediate_size=48"]


@pytest.fixture
def endure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("endure")
    for name, value in {"PROMPT": 4, "TOKENS": 8, "SEQUENCES": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def run(endure: ModuleType, out: Path, tokens: int, arms: str = "adafuse_switch") -> tuple[int, list[dict]]:
    status = endure.main(["tiny", arms, "--tokens", str(tokens), "--out", str(out), "--set", *SMALL])
    return status, list(json.loads(out.read_text()).values())


def test_arms_have_their_tokens_and_go_on_from_there(endure: ModuleType, tmp_path: Path, monkeypatch) -> None:
    status, lines = run(endure, tmp_path / "out.json", 32, "adafuse_switch,base")
    assert status == 0 and [line["tokens"] for line in lines] == [32, 32]
    rounds, decoded = [], endure.decoded
    monkeypatch.setattr(
        endure, "decoded", lambda *of, seed: (rounds.append(seed), decoded(*of, seed=seed))[1]
    )
    status, lines = run(endure, tmp_path / "out.json", 48, "adafuse_switch,base")
    assert status == 0 and rounds == [32, 32] and [line["tokens"] for line in lines] == [48, 48]


def test_a_wrong_token_and_a_weight_that_stays_moved_are_found(
    endure: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    decoded = endure.decoded

    def wrong(decoder, model, seed):
        ids = decoded(decoder, model, seed=seed)
        ids[0, -1] = (ids[0, -1] + 1) % 260
        return ids

    monkeypatch.setattr(endure, "decoded", wrong)
    status, (line,) = run(endure, tmp_path / "wrong.json", 16)
    assert status == 1 and line["different"] == 1 and line["moved"] == 0

    def moved(decoder, model, seed):
        ids = decoded(decoder, model, seed=seed)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-6
        return ids

    assert endure.is_sound(line | {"different": 0}) and not endure.is_sound(
        line | {"different": 0, "grown_gib": [0.0, 0.3]}
    )
    monkeypatch.setattr(endure, "decoded", moved)
    status, (line,) = run(endure, tmp_path / "moved.json", 16)
    assert status == 1 and line["moved"] == 1


def test_what_is_no_model_or_arm_is_one_line(endure: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in ((["nobody", "base"], "nobody"), (["tiny", "adafuse_swich"], "adafuse_swich")):
        assert endure.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and named in said and said.count("\n") == 1
