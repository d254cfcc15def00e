"""A latency cell end to end: checked, accounted, timed; a failing arm is recorded and not timed."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adafuse import records
from adafuse.adapters.adapter import Adapter
from adafuse.bench import cost, device, latency, layer, rounds
from adafuse.config import StrategyName
from adafuse.kernels import naive
from adafuse.refusals import PEFT
from synthetic.configurations import GEOMETRY, compose

QUICK = ["latency.rounds=2", "latency.check_tokens=8", "latency.trained_adapters=false", "context=8"]
RUN = {
    "task": "latency",
    "cell_id": "c",
    "config_hash": "0",
    "config": {},
    "machine": {},
    "schema": records.SCHEMA,
}


def measure(model, tmp_path: Path, *overrides: str, block_tokens: int = 4) -> records.Record:
    """A user's blocks have at least 64 tokens."""
    config = compose(*GEOMETRY, *QUICK, *overrides)
    config.latency.block_tokens = block_tokens
    with records.open_record(tmp_path / "cell.jsonl", RUN) as record:
        latency.run(config, model, "cpu", record)
    return records.read(tmp_path / "cell.jsonl")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)
    # or a cell of which nothing counts would be an error on a busy machine
    monkeypatch.setattr(rounds, "preempted", lambda where, seen: None)


def test_arms_are_checked_then_timed(tiny_llama, tmp_path: Path) -> None:
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "arms=smoke", block_tokens=64)
    arms = ["base", "base_again", "adafuse_gather", "adafuse_switch"]
    assert record.status == "ok"
    assert {line["arm"] for line in record.of("check")} == set(arms)
    assert all(line["passed"] for line in record.of("check"))
    assert sorted(line["arm"] for line in record.of("block")) == sorted(arms * 2)
    kinds = [line["kind"] for line in record.lines]
    assert kinds.index("block") > max(i for i, kind in enumerate(kinds) if kind == "check")
    assert all(line["block_ms"] > 0 and line["tokens"] == 64 for line in record.of("block"))


def test_tokens_left_to_the_backbone_are_checked_timed_and_accounted_for(tiny_llama, tmp_path: Path) -> None:
    arms = "arms.run=[base,adafuse_dense,adafuse_gather,adafuse_switch,adafuse_rebase]"
    cell = [arms, "latency.gates=uniform", "method.null_expert=true"]
    floors = []
    for share in (0.0, 0.5, 1.0):
        (tmp_path / str(share)).mkdir()
        record = measure(
            tiny_llama(num_hidden_layers=2), tmp_path / str(share), *cell, f"latency.bypass_share={share}"
        )
        assert record.status == "ok" and all(line["passed"] for line in record.of("check"))
        assert len(record.of("block")) == 2 * 5
        assert {line["used_share"] for line in record.of("routing")} == {1 - share}
        floors.append({line["arm"]: line["bytes_per_token"] for line in record.of("cost")})
    for arm in ("adafuse_gather", "adafuse_switch", "adafuse_rebase"):
        assert floors[0][arm] > floors[1][arm] > floors[2][arm] > floors[2]["base"]
    assert floors[0]["adafuse_dense"] == floors[2]["adafuse_dense"], "it reads all experts for every token"


def test_an_arm_that_fails_its_check_is_not_timed(tiny_llama, tmp_path: Path, monkeypatch, capsys) -> None:
    expand = naive.expand_all_
    monkeypatch.setattr(naive, "expand_all_", lambda y, u, *rest: expand(y, 1.5 * u, *rest))
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "arms=smoke")
    said = capsys.readouterr().out
    assert "arm adafuse_gather is dropped: check logits: " in said and said.count("\n") == 1
    assert record.status == "ok", "the others are left"
    failed = {line["arm"] for line in record.of("check") if not line["passed"]}
    assert failed == {"adafuse_gather"}
    assert {line["arm"] for line in record.of("block")} == {"base", "base_again", "adafuse_switch"}


def test_a_cell_of_which_no_arm_is_left_fails(tiny_llama, tmp_path: Path, monkeypatch, capsys) -> None:
    expand = naive.expand_all_
    monkeypatch.setattr(naive, "expand_all_", lambda y, u, *rest: expand(y, 1.5 * u, *rest))
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "arms=smoke", "arms.run=[adafuse_gather]")
    assert record.status == "error" and not record.of("block")
    assert record.of("error")[0]["message"].endswith("nothing of this cell counts: every arm is dropped")
    assert "is dropped" in capsys.readouterr().out


def test_blocks_that_are_set_aside_are_said(tiny_llama, tmp_path: Path, monkeypatch, capsys) -> None:
    model, cell = tiny_llama(num_hidden_layers=2), ["arms=smoke", "arms.run=[base]", "latency.rounds=3"]
    for lost, status in ((1, "ok"), (3, "error")):
        (tmp_path / str(lost)).mkdir()
        # before them all is one block that is nobody's
        seen = iter([None] + ["preempted: by a test"] * lost + [None] * 3)
        monkeypatch.setattr(rounds, "preempted", lambda where, state, seen=seen: next(seen))
        record = measure(model, tmp_path / str(lost), *cell)
        assert record.status == status and len(record.of("block")) == 3
        said = capsys.readouterr().out
        assert said == f"arm base: {lost} of 3 blocks are set aside (preempted: by a test)\n"
    assert "run it again when the machine is idle" in record.of("error")[0]["message"]


def test_a_merging_arm_in_a_mixed_batch_is_recorded_as_refused(tiny_llama, tmp_path: Path) -> None:
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "arms=smoke", "batch=2")
    refused = [line for line in record.of("check") if not line["passed"]]
    assert [(line["arm"], line["check"]) for line in refused] == [("adafuse_switch", "runs")]
    assert "gates of this batch differ" in refused[0]["detail"]
    assert "adafuse_gather" in {line["arm"] for line in record.of("block")}


def test_macs_of_attention_count_every_query_head() -> None:
    """Grouped queries share keys, not work; the count of some versions of torch stops at them."""
    with torch.device("meta"):
        query, key = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 33, 64)
        with FlopCounterMode(display=False, custom_mapping=cost.UNCOUNTED) as counter:
            torch.ops.aten._scaled_dot_product_efficient_attention(query, key, key, None, False)
    assert counter.get_total_flops() == 2 * 2 * 8 * 33 * (64 + 64)


def test_macs_are_counted(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    prompt = torch.arange(4, 12)[None]
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    plain = cost.count_macs(model, None, StrategyName.dense, prompt)
    assert linears <= plain <= 1.1 * linears, "all linears once, and a little attention"
    adapter = Adapter(model, config.method, config.experts, 0)
    downs = sum(s.experts.lora_A.numel() for s in adapter.adapted().values())
    up = sum(s.experts.lora_B[0].numel() for s in adapter.adapted().values())
    router = adapter.token_router.weight.numel()
    macs = {
        s: cost.count_macs(model, adapter, s, prompt) - plain - router for s in StrategyName if s not in PEFT
    }
    assert macs[StrategyName.gather] == downs + 2 * up, "the base product shrinks for all experts"
    assert (
        macs[StrategyName.fused] == macs[StrategyName.loop] == (2 * downs) // adapter.geometry.count + 2 * up
    )
    assert macs[StrategyName.masked_loop] == downs + adapter.geometry.count * up


def test_a_window_bounds_what_is_read_of_the_cache(tiny_llama) -> None:
    ids, slot = torch.ones(2, 12, dtype=torch.int64), 2 * 2 * 8 * 4
    mixed = {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True}
    for model_type, own, blocks in (("mistral", {}, 4), ("qwen2", mixed, 2)):
        near, far = (tiny_llama(model_type, **own, sliding_window=window) for window in (4, 100))
        less = cost.backbone_bytes(far, ids) - cost.backbone_bytes(near, ids)
        assert less == 2 * blocks * (12 - 4) * slot


def test_bytes_tell_the_strategies_apart(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    adapter = Adapter(model, config.method, config.experts, 0)
    extra = {s: cost.adapter_bytes(adapter, s, batch=1) for s in StrategyName if s not in PEFT}
    weights = 4 * sum(s.base.weight.numel() for s in adapter.adapted().values())
    assert extra[StrategyName.gather] < extra[StrategyName.dense] < extra[StrategyName.rebase]
    assert extra[StrategyName.rebase] > 2 * weights, "a merge reads and writes every adapted weight once more"


def test_layer_lines(tmp_path: Path) -> None:
    overrides = [
        "method=moral",
        "layer.runs=20",
        "layer.warmup=1",
        "layer.ranks=[2,4]",
        "layer.sequence_lengths=[3,1]",
    ]
    config = compose(*overrides)
    with records.open_record(tmp_path / "layer.jsonl", RUN) as record:
        layer.run(config, "cpu", record)
    lines = records.read(tmp_path / "layer.jsonl").of("layer")
    assert {(line["sequence_length"], line["rank"], line["part"]) for line in lines} == {
        (length, rank, part)
        for length in (3, 1)
        for rank in (2, 4)
        for part in ("backbone", "adapters", "both")
    }
    assert all(line["phase"] == ("decode" if line["sequence_length"] == 1 else "prefill") for line in lines)


def test_flags_of_the_rounds_are_written_and_their_blocks_kept(
    tiny_llama, tmp_path: Path, monkeypatch
) -> None:
    clocks = iter([1980.0] * 9 + [1000.0] + [1980.0] * 100)
    monkeypatch.setattr(device, "state", lambda where: {"sm_mhz": next(clocks)})
    overrides = ("arms=smoke", "arms.run=[base]", "latency.rounds=5")
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, *overrides)
    (flag,) = record.of("flag")
    # one sample before the run, two for each block and for the one before the first
    assert (flag["arm"], flag["round"]) == ("base", 3) and "SM clock" in flag["reason"]
    assert len(record.of("block")) == 5
    assert record.of("calibration")[0]["rmw_gbps"] > 0
