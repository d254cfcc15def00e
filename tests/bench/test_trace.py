"""task=trace: parts sum to what ran, each arm has the parts it should, and nothing of a trace stays behind."""

import gzip
import json
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from adafuse import cell, records
from adafuse.bench import trace
from adafuse.bench.trace_parts import PARTS, plain_parts, scopes
from adafuse.config import Runtime, StrategyName
from adafuse.engine.make import make
from adafuse.model.projections import Joint
from adafuse.strategies.joined import Extended
from synthetic.configurations import GEOMETRY, compose

QUICK = ["task=trace", "latency.trained_adapters=false", "context=8"]
RUN = {
    "task": "trace",
    "cell_id": "c",
    "config_hash": "0",
    "config": {},
    "machine": {},
    "schema": records.SCHEMA,
}
# one of every way in which experts reach a token
ARMS = [
    "base",
    "mola_loop",
    "pesc_gather",
    "moral_simple_merge",
    "adafuse_gather",
    "adafuse_switch",
    "adafuse_fused_graph",
]


def measure(model, folder: Path, *overrides: str, where: str = "cpu") -> records.Record:
    config = compose(*GEOMETRY, *QUICK, f"runs_dir={folder}", *overrides)
    with records.open_record(folder / "cell.jsonl", RUN) as record:
        trace.run(config, model, where, record)
    return records.read(folder / "cell.jsonl")


def by_arm(record: records.Record, kind: str) -> dict[str, dict]:
    return {line["arm"]: line for line in record.of(kind)}


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[records.Record, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("trace")
    model = LlamaForCausalLM(shape).eval().requires_grad_(False)
    return measure(model, folder, f"arms.run=[{','.join(ARMS)}]"), folder


def test_every_arm_leaves_its_lines(traced) -> None:
    record, _ = traced
    assert record.status == "ok"
    for kind in ("trace", "spans", "artifact"):
        assert list(by_arm(record, kind)) == ARMS
    for line in record.of("trace"):
        assert tuple(line["parts_ms"]) == PARTS
        assert (line["attributed_by"], line["graph_nodes"], line["unlinked"]) == ("scopes", None, 0)
        assert line["host_launches"] == line["launches"] > 0 and line["untraced_ms"] > 0


def test_parts_sum_to_the_time_in_which_something_ran(traced) -> None:
    record, _ = traced
    spans = by_arm(record, "spans")
    for arm, line in by_arm(record, "trace").items():
        own = spans[arm]["spans"]
        assert len(own) == line["launches"]
        assert all(one[0] + one[1] <= two[0] + 2e-3 for one, two in pairwise(own)), "in order, none twice"
        busy_ms = sum(length for _, length, _ in own) / 1e3
        assert sum(line["parts_ms"].values()) == pytest.approx(busy_ms, abs=1e-6 * len(own))
        assert 0 < line["gap_ms"] == pytest.approx(line["token_ms"] - busy_ms, abs=1e-6 * len(own))
        assert own[-1][0] + own[-1][1] < 1e3 * line["token_ms"]


def test_arms_have_the_parts_that_they_should(traced) -> None:
    record, _ = traced
    found = {
        arm: {part for part, ms in line["parts_ms"].items() if ms}
        for arm, line in by_arm(record, "trace").items()
    }
    plain = {"base_gemm", "attention", "other"}
    assert found == {
        "base": plain,
        "mola_loop": plain | {"adapters", "routing"},
        "pesc_gather": plain | {"adapters", "routing"},
        "moral_simple_merge": plain | {"routing", "switch"},
        "adafuse_gather": plain | {"adapters", "routing"},
        "adafuse_switch": plain | {"routing", "switch"},
        # one kernel does it all; beside it only the columns are cut
        "adafuse_fused_graph": plain | {"adapters", "routing"},
    }
    launches = {arm: line["launches"] for arm, line in by_arm(record, "trace").items()}
    assert launches["mola_loop"] > 3 * launches["base"]
    assert launches["adafuse_switch"] > launches["base"]


def test_frozen_products_are_counted_one_by_one(traced) -> None:
    """Seven linears in each of two blocks, and the head; four projections where they are joined."""
    record, _ = traced
    spans = by_arm(record, "spans")
    counts = {arm: sum(part == "base_gemm" for *_, part in spans[arm]["spans"]) for arm in ARMS}
    for arm in ("base", "mola_loop", "moral_simple_merge", "adafuse_switch"):
        assert counts[arm] == 2 * 7 + 1, arm
    assert counts["adafuse_fused_graph"] == counts["adafuse_gather"] == 2 * 4 + 1


def test_the_file_is_a_chrome_trace_without_the_machine_in_it(traced) -> None:
    record, folder = traced
    for arm, line in by_arm(record, "artifact").items():
        path = Path(line["path"])
        assert path == folder / "traces" / path.parent.name / f"{arm}.json.gz"
        assert line["sha256"] == cell.file_hash(path)
        text = gzip.decompress(path.read_bytes()).decode()
        for secret in (
            "host_name",
            socket.gethostname() + '"',
            str(folder),
            str(Path.home()),
            "site-packages",
        ):
            assert secret not in text
        events = [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X"]
        assert min(event["ts"] for event in events) == 0
        launched = [event for event in events if event["pid"] == trace.LAUNCHES]
        assert len(launched) == by_arm(record, "trace")[arm]["launches"]
        assert {event["cat"] for event in launched} <= set(PARTS)


def test_nothing_of_it_stays_in_the_timed_path(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    prompt = torch.arange(4, 12)[None]

    def decode() -> torch.Tensor:
        decoder = make(model, None, StrategyName.dense, Runtime.eager, 40)
        decoder.start(prompt)
        return decoder.run(8)

    modules, tokens = dict(model.named_modules()), decode()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    methods = Joint.output, Extended.product
    measure(model, tmp_path, f"arms.run=[{','.join(ARMS)}]")
    assert dict(model.named_modules()) == modules
    assert methods == (Joint.output, Extended.product)
    for module in modules.values():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(decode(), tokens)


def test_scopes_leave_when_the_code_inside_fails(tiny_llama) -> None:
    model = tiny_llama(num_hidden_layers=2)
    before = Joint.output
    with pytest.raises(RuntimeError, match="stop"), scopes(model, plain_parts(model), None):
        assert "forward" in vars(model.model.layers[0].self_attn) and Joint.output is not before
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in model.modules()) and Joint.output is before


def test_one_arm_fails_and_the_others_go_on(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    def broken(model, adapter, strategy, runtime, length):
        if strategy is StrategyName.switch:
            raise RuntimeError("no switch today")
        return make(model, adapter, strategy, runtime, length)

    monkeypatch.setattr(trace, "make", broken)
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "arms=smoke")
    assert record.status == "error"
    assert [line["where"] for line in record.of("error")] == ["arm adafuse_switch"]
    assert list(by_arm(record, "trace")) == ["base", "base_again", "adafuse_gather"]


def test_a_captured_merge_leaves_the_products_to_the_backbone(tiny_llama, tmp_path: Path) -> None:
    """Off a GPU the same step runs uncaptured: its joined projections are the backbone's, whatever was merged."""
    record = measure(
        tiny_llama(), tmp_path, "arms.run=[base_graph,adafuse_rebase_graph,adafuse_gather_graph]"
    )
    parts = {arm: line["parts_ms"] for arm, line in by_arm(record, "trace").items()}
    assert parts["adafuse_rebase_graph"]["adapters"] == parts["base_graph"]["adapters"] == 0
    assert parts["adafuse_gather_graph"]["adapters"] > 0
    assert parts["adafuse_rebase_graph"]["switch"] > 0 and parts["adafuse_rebase_graph"]["base_gemm"] > 0


def test_peft_is_told_apart_too(tiny_llama, tmp_path: Path) -> None:
    record = measure(tiny_llama(num_hidden_layers=2), tmp_path, "arms.run=[lora_peft,adafuse_peft_merge]")
    parts = {arm: line["parts_ms"] for arm, line in by_arm(record, "trace").items()}
    assert parts["lora_peft"]["adapters"] > 0 and not parts["lora_peft"]["switch"]
    assert parts["adafuse_peft_merge"]["switch"] > 0 and not parts["adafuse_peft_merge"]["adapters"]


def test_steps_launched_one_by_one_are_the_steps_of_the_graph(tiny_llama) -> None:
    model, prompt = tiny_llama(num_hidden_layers=2), torch.arange(4, 12)[None]
    ids = []
    for single in (False, True):
        decoder = make(model, None, StrategyName.dense, Runtime.graph, 40)
        decoder.start(prompt)
        with decoder.decoding():
            decoder.run_uncaptured(5) if single else decoder.run(5)
            ids.append(decoder.run(5))
    assert torch.equal(*ids)


@pytest.mark.gpu
def test_a_captured_token_is_one_launch_of_the_host(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256).cuda()
    arms = "base_graph,adafuse_gather_graph,adafuse_switch_graph,adafuse_gather,base"
    record = measure(model, tmp_path, f"arms.run=[{arms}]", where="cuda")
    assert record.status == "ok"
    lines = by_arm(record, "trace")
    for arm in ("base_graph", "adafuse_gather_graph", "adafuse_switch_graph"):
        line = lines[arm]
        assert (line["host_launches"], line["attributed_by"]) == (1, "replay order"), line["disagreement"]
        assert line["graph_nodes"] == line["launches"] > 1 and line["unlinked"] == 0
    assert lines["adafuse_gather_graph"]["parts_ms"]["adapters"] > 0
    assert lines["adafuse_switch_graph"]["parts_ms"]["switch"] > 0
    assert lines["adafuse_switch_graph"]["parts_ms"]["adapters"] == 0
    assert not lines["base_graph"]["parts_ms"]["adapters"]
    for arm in ("base", "adafuse_gather"):
        line = lines[arm]
        assert (line["attributed_by"], line["graph_nodes"]) == ("scopes", None)
        assert line["host_launches"] == line["launches"] > 1
    assert lines["adafuse_gather"]["parts_ms"]["routing"] > 0
