"""task=fit_speed on a tiny shape: every method is checked and timed beside PEFT's LoRA, and what is wrong is not."""

from pathlib import Path

import pytest
import torch

from adafuse import records
from adafuse.bench import calibration, device, fit_speed, rounds
from adafuse.bench.fit_speed import PEFT
from synthetic.configurations import GEOMETRY, METHODS, compose

RUN = {
    "task": "fit_speed",
    "cell_id": "c",
    "config_hash": "0",
    "config": {},
    "machine": {},
    "schema": records.SCHEMA,
}
# rank 8 on all linears of two blocks
PARAMETERS_A_STEP = 8 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
QUICK = ["task=fit_speed", "latency.rounds=2", "latency.check_tokens=8"]
QUICK += ["train.batch=2", "train.max_length=16", "train.steps=1"]


def measure(model, tmp_path: Path, *overrides: str) -> records.Record:
    with records.open_record(tmp_path / "cell.jsonl", RUN) as record:
        fit_speed.run(compose(*GEOMETRY, *QUICK, *overrides), model, "cpu", record)
    return records.read(tmp_path / "cell.jsonl")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)
    monkeypatch.setitem(calibration.MATRIX_SIDE, "cpu", 64)
    # or a cell of which nothing counts would be an error on a busy machine
    monkeypatch.setattr(rounds, "preempted", lambda where, seen: None)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_checked_and_timed_beside_peft(method: str, tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = measure(model, tmp_path, f"method={method}")
    assert record.status == "ok", record.of("error")
    checks = {(line["arm"], line["check"]): line for line in record.of("check")}
    assert set(checks) == {(arm, name) for arm in (PEFT, method) for name in ("loss", "gradient_norm")}
    assert all(line["passed"] for line in checks.values())
    lines = {line["arm"]: line for line in record.of("fit_speed")}
    assert set(lines) == {PEFT, method} and lines[PEFT]["ratio"] == 1 and lines[method]["rounds"] == 2
    (matrix,) = (line["matrix_tflops"] for line in record.of("calibration"))
    for line in lines.values():
        rate = line["tokens_per_s"] * line["flops_per_token"]
        assert line["matrix_share"] == pytest.approx(rate / matrix / 1e12)
    # equal but for half of the step in which ranks go up
    assert abs(lines[PEFT]["parameters"] - lines[method]["parameters"]) <= PARAMETERS_A_STEP / 2
    assert before.keys() == model.state_dict().keys(), "what was installed is gone"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training and not model.is_gradient_checkpointing


def test_pefts_row_trains_what_plain_lora_trains(tiny_llama) -> None:
    model, ids = tiny_llama(num_hidden_layers=2).train(), torch.arange(4, 36).view(2, 16)
    config = compose(*GEOMETRY, *QUICK, "method=lora", "method.dropout=0")
    steps = []
    for make in (fit_speed._peft, fit_speed._ours):
        arm = make(config, model)
        with arm.installed():
            loss = fit_speed._backward(config, model, arm, ids)
        steps.append((loss, torch.stack([p.grad.norm() for p in arm.parameters]).norm()))
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(*steps, strict=True))


def test_flops_are_those_of_the_formula(tiny_llama) -> None:
    """Two blocks of hidden 32 with 48 within, a head of 260 rows."""
    model = tiny_llama(num_hidden_layers=2)
    blocks = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    found = fit_speed.flops_per_token(model, [torch.nn.Parameter(torch.zeros(7))], 16)
    assert found == 6 * blocks + 4 * 260 * 32 + 8 * 7 + 8 * 2 * 16 * 32


def test_an_arm_whose_gradient_is_another_under_checkpointing_is_not_timed(
    tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fit_speed._backward

    def wrong(config, model, arm, ids_BS):
        loss = own(config, model, arm, ids_BS)
        if model.is_gradient_checkpointing and arm.adapter is not None:
            arm.parameters[0].grad *= 2
        return loss

    monkeypatch.setattr(fit_speed, "_backward", wrong)
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "method=adafuse")
    failed = [(line["arm"], line["check"]) for line in record.of("check") if not line["passed"]]
    assert failed == [("adafuse", "gradient_norm")]
    assert (
        {line["arm"] for line in record.of("block")}
        == {PEFT}
        == {line["arm"] for line in record.of("fit_speed")}
    )


def test_an_arm_that_does_not_fit_says_so_and_the_other_goes_on(
    tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(config, model):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. " * 9)

    monkeypatch.setattr(fit_speed, "_ours", too_large)
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "method=mixlora")
    (error,) = record.of("error")
    assert error["where"] == "arm mixlora" and "mixlora does not fit this machine" in error["message"]
    assert [line["arm"] for line in record.of("fit_speed")] == [PEFT]


def test_half_precision_trains_in_fp32_under_autocast(tiny_llama, tmp_path: Path) -> None:
    record = measure(
        tiny_llama(num_hidden_layers=2).bfloat16(), tmp_path, "method=mixlora", "model.dtype=bfloat16"
    )
    assert record.status == "ok" and len(record.of("fit_speed")) == 2, record.of("error")


def test_a_method_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="task=fit_speed trains an adapter and base has none"):
        compose("task=fit_speed", "method=base")
