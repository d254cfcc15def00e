"""What PEFT's arms cost: operations, bytes and memory counted from sizes, and a latency cell that times both."""

from pathlib import Path

import pytest
import torch

from adafuse import records
from adafuse.bench import cost, device, latency, rounds
from adafuse.config import StrategyName
from synthetic.adapters import prompt
from synthetic.configurations import GEOMETRY, compose
from synthetic.peft import ADAFUSE, IN_DTYPES, LORA, adapted, layers_of


def test_macs(tiny_llama) -> None:
    """A merge multiplies every element of a weight by the rank, for each chosen expert, once in and once out."""
    model = tiny_llama()
    lora, adafuse = adapted(model, LORA), adapted(model, ADAFUSE)
    plain = cost.count_macs(model, None, StrategyName.dense, prompt())
    own = cost.count_macs(model, lora, StrategyName.peft, prompt()) - plain
    assert own == sum(parameter.numel() for parameter in lora.parameters())
    assert own == cost.count_macs(model, lora, StrategyName.dense, prompt()) - plain
    merged = cost.count_macs(model, adafuse, StrategyName.peft_merge, prompt()) - plain
    products = 2 * 2 * 4 * sum(site.base.weight.numel() for site in adafuse.adapted().values())
    assert merged == products + adafuse.token_router.weight.numel()
    assert not layers_of(model)


@IN_DTYPES
def test_bytes(dtype: torch.dtype, tiny_llama) -> None:
    model = tiny_llama().to(dtype)
    lora, adafuse = adapted(model, LORA), adapted(model, ADAFUSE)
    each = dtype.itemsize
    experts = sum(parameter.numel() for parameter in lora.parameters())
    for batch in (1, 8):
        assert cost.adapter_bytes(lora, StrategyName.peft, batch) == each * experts
    weights = sum(site.base.weight.numel() for site in adafuse.adapted().values())
    chosen = sum(p.numel() for p in adafuse.parameters() if p is not adafuse.token_router.weight) * 2 // 4
    router = 4 * adafuse.token_router.weight.numel()
    got = cost.adapter_bytes(adafuse, StrategyName.peft_merge, batch=1)
    assert got == router + each * (4 * weights + 2 * chosen)
    switch = cost.adapter_bytes(adafuse, StrategyName.switch, batch=1)
    assert got - switch == each * 2 * weights, (
        "one more reading and writing of the weights than our merge in place"
    )


def test_what_the_arms_hold(tiny_llama) -> None:
    """PEFT's modules share our factors; merging in place holds nothing more."""
    model = tiny_llama()
    lora, adafuse = adapted(model, LORA), adapted(model, ADAFUSE)
    backbone = cost.weights_gib(model, None, StrategyName.dense)
    own = sum(parameter.numel() for parameter in lora.parameters()) * 4 / 2**30
    assert cost.weights_gib(model, lora, StrategyName.peft) == pytest.approx(backbone + own)
    held = cost.weights_gib(model, adafuse, StrategyName.peft_merge)
    assert held == cost.weights_gib(model, adafuse, StrategyName.switch)


def test_the_cell_times_both(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)
    monkeypatch.setattr(rounds, "preempted", lambda where, seen: None)
    quick = ["latency.rounds=2", "latency.check_tokens=8", "latency.trained_adapters=false", "context=8"]
    config = compose(
        *GEOMETRY, *quick, "arms=peft", "arms.run=[lora_dense,lora_peft,adafuse_switch,adafuse_peft_merge]"
    )
    config.latency.block_tokens = 4
    run = {"task": "latency", "cell_id": "c", "config_hash": "0", "config": {}, "machine": {}, "schema": 1}
    with records.open_record(tmp_path / "cell.jsonl", run) as record:
        latency.run(config, tiny_llama(), "cpu", record)
    written = records.read(tmp_path / "cell.jsonl")
    assert written.status == "ok", written.of("error")
    assert all(line["passed"] for line in written.of("check"))
    assert sorted(line["arm"] for line in written.of("block")) == sorted(config.arms.run * 2)
