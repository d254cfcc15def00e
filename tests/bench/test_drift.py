"""task=drift: switch drifts, rebase does not, a refresh starts anew, and the backbone is clean afterwards."""

from pathlib import Path

import pytest
import torch

from adafuse import cell, records
from adafuse.bench import drift
from adafuse.strategies.merge import Rebase, Switch
from synthetic.configurations import GEOMETRY, compose

RUN = {
    "task": "drift",
    "cell_id": "c",
    "config_hash": "0",
    "config": {},
    "machine": {},
    "schema": records.SCHEMA,
}
QUICK = ["drift.switches=[1,3,10,30]", "drift.refresh_every=10", "drift.prompts=2", "context=8"]
FIELDS = ("weight_error", "delta_error", "logit_error", "agreement", "identical", "delta_share", "dtype")


def measure(model, tmp_path: Path, *overrides: str) -> dict[tuple[str, int], dict]:
    config = compose(*GEOMETRY, *QUICK, "task=drift", "latency.trained_adapters=false", *overrides)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    with records.open_record(path, RUN) as record:
        drift.run(config, model, "cpu", record)
    lines = records.read(path).of("drift")
    return {(line["strategy"], line["switches"]): line for line in lines}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_switch_drifts_and_rebase_does_not(tiny_llama, tmp_path: Path, dtype: str) -> None:
    model = tiny_llama()
    wanted = [p.detach().to(getattr(torch, dtype), copy=True) for p in model.parameters()]
    lines = measure(model, tmp_path, f"drift.dtype={dtype}")
    assert list(lines) == [(s, t) for s in ("switch", "rebase", "switch_refresh") for t in (1, 3, 10, 30)]
    assert all(field in line for line in lines.values() for field in FIELDS)
    first, eps = lines["rebase", 1], torch.finfo(getattr(torch, dtype)).eps
    assert 0 < first["weight_error"] < eps, "one rounding of each weight"
    for count in (1, 3, 10, 30):
        rebase = lines["rebase", count]
        assert rebase["identical"] and {**rebase, "switches": 1} == first
    assert lines["switch", 1]["weight_error"] == first["weight_error"], "from clean weights both are one sum"
    errors = [lines["switch", count]["weight_error"] for count in (1, 3, 10, 30)]
    assert errors == sorted(errors) and errors[-1] > 2 * errors[0]
    assert [lines["switch", count]["identical"] for count in (1, 3, 10, 30)] == [True, False, False, False]
    share = first["delta_share"]
    assert 0.001 < share < 1
    # |W| / |dW| lies between the two errors; W_0 + dW is about as long as W_0
    assert first["delta_error"] == pytest.approx(first["weight_error"] / share, rel=0.1)
    for now, clean in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(now, clean), "the backbone is clean again"


def test_a_refresh_is_measured_when_it_is_oldest(tiny_llama, tmp_path: Path) -> None:
    lines = measure(tiny_llama(), tmp_path)
    assert lines["switch_refresh", 10]["weight_error"] == lines["switch", 10]["weight_error"]
    refreshed, drifted = lines["switch_refresh", 30]["weight_error"], lines["switch", 30]["weight_error"]
    assert lines["rebase", 30]["weight_error"] < refreshed < drifted
    every = measure(tiny_llama(), tmp_path, "drift.refresh_every=1")
    assert all(every["switch_refresh", count]["identical"] for count in (1, 3, 10, 30))


def test_errors_are_against_the_exact_sum(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    """In fp32 nothing is lost that counts; a merge with the wrong sign is as wrong as two deltas are long."""
    exact = measure(tiny_llama(), tmp_path, "drift.dtype=float32")
    assert exact["rebase", 30]["delta_error"] < 1e-4 and exact["rebase", 30]["logit_error"] < 1e-4
    assert exact["rebase", 30]["agreement"] == 1.0
    write = Rebase._write

    def wrong(self: Rebase) -> None:
        self._selection.gate_S.neg_()
        write(self)
        self._selection.gate_S.neg_()

    monkeypatch.setattr(Rebase, "_write", wrong)
    off = measure(tiny_llama(), tmp_path, "drift.dtype=float32")["rebase", 30]
    assert off["delta_error"] == pytest.approx(2.0, rel=1e-3) and off["logit_error"] > 1e-2
    assert off["identical"], "wrong, and always the same"


def test_a_switch_that_forgets_the_old_experts_is_seen(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    write = Switch._write

    def forgets(self: Switch) -> None:
        self._selection.gate_S[self._selection.top_k :] = 0
        write(self)

    monkeypatch.setattr(Switch, "_write", forgets)
    lines = measure(tiny_llama(), tmp_path, "drift.dtype=float32")
    assert lines["switch", 1]["delta_error"] < 1e-4 and lines["switch", 30]["delta_error"] > 1


def test_measured_linears_are_in_the_first_the_middle_and_the_last_block(tiny_llama) -> None:
    from adafuse.adapters.adapter import Adapter

    config = compose(*GEOMETRY, "method=adafuse")
    adapter = Adapter(tiny_llama(), config.method, config.experts, 0)
    watched = drift._watched(adapter)
    assert {path.split(".")[2] for path in watched} == {"0", "2", "3"} and len(watched) == 3 * 7


def test_it_stands_on_the_backbone_and_on_a_trained_adapter_if_asked_for_one() -> None:
    config = compose("task=drift", "method=adafuse", "latency.trained_adapters=true")
    assert [c.task.name for c in cell.needs(config)] == ["pretrain", "train"]
    config = compose("task=drift", "profile=gpu")
    assert not list(cell.needs(config)), "random weights, random factors"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("method=mola", "use method=adafuse"),
        ("method=lora", "use method=adafuse"),
        ("drift.switches=[]", "drift.switches"),
        ("drift.switches=[5,1]", "drift.switches must rise"),
        ("drift.refresh_every=0", "drift.refresh_every"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compose("task=drift", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_on_a_gpu_the_strategies_are_the_launches(tiny_llama, tmp_path: Path) -> None:
    config = compose(*GEOMETRY, *QUICK, "task=drift", "latency.trained_adapters=false")
    model = tiny_llama().to("cuda")
    with records.open_record(tmp_path / "drift.jsonl", RUN) as record:
        drift.run(config, model, "cuda", record)
    lines = records.read(tmp_path / "drift.jsonl").of("drift")
    assert all(line["identical"] for line in lines if line["strategy"] == "rebase")
