"""task=trace: parts sum to what ran, each arm has the parts it should, and nothing of a trace stays behind."""

import gzip
import json
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from adafuse import identity, records
from adafuse.bench import trace, trace_file
from adafuse.bench.trace_parts import (
    Launch,
    Token,
    by_name,
    by_replay_order,
    part_of_name,
    parts_ms,
    tokens_of,
)
from adafuse.bench.trace_scopes import MARK, PARTS, PREFIX, plain_parts, scopes
from adafuse.config import Runtime, StrategyName
from adafuse.engine import decoders
from adafuse.engine.projections import Joint
from adafuse.engine.strategies.joined import Extended
from conftest import GEOMETRY, compose

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
        assert line["sha256"] == identity.file_hash(path)
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
        launched = [event for event in events if event["pid"] == trace_file.LAUNCHES]
        assert len(launched) == by_arm(record, "trace")[arm]["launches"]
        assert {event["cat"] for event in launched} <= set(PARTS)


def test_nothing_of_it_stays_in_the_timed_path(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    prompt = torch.arange(4, 12)[None]

    def decode() -> torch.Tensor:
        decoder = decoders.make(model, None, StrategyName.dense, Runtime.eager, 40)
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
    make = decoders.make

    def broken(model, adapter, strategy, runtime, length):
        if strategy is StrategyName.switch:
            raise RuntimeError("no switch today")
        return make(model, adapter, strategy, runtime, length)

    monkeypatch.setattr(decoders, "make", broken)
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
        decoder = decoders.make(model, None, StrategyName.dense, Runtime.graph, 40)
        decoder.start(prompt)
        with decoder.decoding():
            decoder.run_uncaptured(5) if single else decoder.run(5)
            ids.append(decoder.run(5))
    assert torch.equal(*ids)


# made-up traces: what a GPU's profiler would say


def host(cat: str, name: str, ts: float, dur: float, number: int | None = None) -> dict:
    args = {} if number is None else {"correlation": number}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def kernel(name: str, ts: float, dur: float, number: int, cat: str = "kernel") -> dict:
    args = {"correlation": number}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 7, "args": args}


def eager_token(at: float, number: int, delay: float = 100) -> list[dict]:
    """A product inside the attention module, the module's own kernel, and a copy outside; the device lags behind."""
    return [
        host("user_annotation", MARK, at, 0.5),
        host("user_annotation", f"{PREFIX}attention", at + 1, 20),
        host("user_annotation", f"{PREFIX}base_gemm", at + 2, 5),
        host("cuda_runtime", "cudaLaunchKernel", at + 3, 1, number),
        host("cuda_driver", "cuLaunchKernelEx", at + 10, 1, number + 1),
        host("cuda_runtime", "cudaMemcpyAsync", at + 30, 1, number + 2),
        kernel("gemv", at + delay, 10, number),
        kernel("softmax", at + delay + 8, 4, number + 1),
        kernel("Memcpy DtoH (Device -> Pageable)", at + delay + 20, 5, number + 2, "gpu_memcpy"),
    ]


def test_kernels_take_the_scope_of_the_call_that_launched_them() -> None:
    events = [event for n in range(3) for event in eager_token(40 * n, 10 * n)]
    # launched before the first token, and by nobody
    events += [
        host("cuda_runtime", "cudaLaunchKernel", -5, 1, 900),
        kernel("early", 5, 1, 900),
        kernel("lost", 150, 1, 901),
    ]
    tokens, lost = tokens_of(events, on_gpu=True)
    assert (len(tokens), lost) == (2, 1), "nothing says where the last one ends"
    for number, token in enumerate(tokens):
        assert [launch.part for launch in token.launches] == ["base_gemm", "attention", "other"]
        assert [launch.call for launch in token.launches] == [10 * number, 10 * number + 1, 10 * number + 2]
        assert (token.begin_us, token.length_us) == (40 * number + 100, 40)
        spent = parts_ms(token.launches)
        assert spent["attention"] == pytest.approx(0.002), "cut where the one before still ran"
        assert sum(spent.values()) == pytest.approx(0.017)


def test_operators_of_ours_say_themselves_what_they_are() -> None:
    """Also where the profiler did not see the call: the operator around it is known by another number."""
    events = []
    for n in range(2):
        own = host("cpu_op", "adafuse::route", 40 * n + 3, 4)
        launched = kernel("route_kernel", 40 * n + 100, 3, n)
        for event in (own, launched):
            event["args"]["External id"] = 5 + n
        events += [host("user_annotation", MARK, 40 * n, 1), own, launched]
    (token,), lost = tokens_of(events, on_gpu=True)
    assert [launch.part for launch in token.launches] == ["routing"] and lost == 0


def test_on_a_cpu_an_operator_that_another_calls_is_no_launch() -> None:
    events = []
    for n in range(2):
        events += [
            host("user_annotation", MARK, 40 * n, 1),
            host("user_annotation", f"{PREFIX}base_gemm", 40 * n + 2, 20),
            host("cpu_op", "aten::linear", 40 * n + 3, 10),
            host("cpu_op", "aten::addmm", 40 * n + 4, 8),
            host("cpu_op", "aten::add", 40 * n + 25, 2),
        ]
    (token,), _ = tokens_of(events, on_gpu=False)
    assert [(launch.name, launch.part) for launch in token.launches] == [
        ("aten::linear", "base_gemm"),
        ("aten::add", "other"),
    ]


def test_a_token_without_a_launch_is_an_error() -> None:
    events = [event for n in range(3) for event in eager_token(40 * n, 10 * n)]
    silent = [event for event in events if event["cat"] not in ("kernel", "gpu_memcpy")]
    with pytest.raises(ValueError, match="the profiler saw 0 launches in 3 tokens"):
        tokens_of(silent, on_gpu=True)


def sequence(*named: tuple[str, str]) -> list[Launch]:
    return [Launch(name, 10.0 * n, 5.0, part, n) for n, (name, part) in enumerate(named)]


STEP = sequence(
    ("gemv", "base_gemm"),
    ("Memcpy DtoD (Device -> Device)", "other"),
    ("gemv", "adapters"),
    ("expand_all_kernel", "adapters"),
)


def test_a_replay_takes_the_parts_of_a_step_in_order() -> None:
    replayed = sequence(
        ("gemv", "other"), ("Memcpy DtoD", "other"), ("gemv", "other"), ("expand_all_kernel", "other")
    )
    found, disagreement = by_replay_order(replayed, STEP)
    assert disagreement is None
    assert [launch.part for launch in found] == ["base_gemm", "other", "adapters", "adapters"]
    assert [launch.start_us for launch in found] == [launch.start_us for launch in replayed]


@pytest.mark.parametrize(
    ("replayed", "message"),
    [
        (sequence(*[("gemv", "other")] * 3), "3 launches in a replay, 4 one by one"),
        (sequence(*[("gemv", "other")] * 4), "launch 1 is gemv in a replay, Memcpy DtoD"),
    ],
)
def test_a_replay_that_differs_from_the_step_is_said(replayed: list[Launch], message: str) -> None:
    found, disagreement = by_replay_order(replayed, STEP)
    assert found == replayed and disagreement.startswith(message)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "base_gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "base_gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "base_gemm"),
        ("fused_kernel", "base_gemm"),
        ("linear_kernel", "base_gemm"),
        ("triton_poi_fused_add_mul_silu_3", "other"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("expand_all_kernel", "adapters"),
        ("shrink_kernel", "adapters"),
        ("route_kernel", "routing"),
        ("switch_kernel", "switch"),
        ("void at::native::reduce_kernel<512, 1, ArgMaxOps>", "other"),
    ],
)
def test_names_tell_most_kernels_apart(name: str, part: str) -> None:
    assert part_of_name(name) == part


def test_the_names_are_those_of_our_kernels() -> None:
    """A kernel that is renamed must not fall among the others."""
    source = "".join(path.read_text() for path in Path(trace.__file__).parents[1].glob("kernels/*.py"))
    for name in ("switch", "route", "shrink", "expand", "expand_all", "fused", "linear"):
        assert f"def {name}_kernel(" in source
        assert part_of_name(f"{name}_kernel") != "other"


@pytest.mark.parametrize(
    ("runtime", "stepped", "want"),
    [
        (Runtime.graph, STEP, ("replay order", ["base_gemm", "other", "adapters", "adapters"])),
        (Runtime.graph, STEP[:3], ("names", ["base_gemm", "other", "base_gemm", "adapters"])),
        (Runtime.compiled, STEP, ("names", ["base_gemm", "other", "base_gemm", "adapters"])),
    ],
)
def test_how_a_captured_step_is_attributed(runtime, stepped, want, tiny_llama, monkeypatch) -> None:
    model = tiny_llama(num_hidden_layers=2)
    decoder = decoders.make(model, None, StrategyName.dense, Runtime.graph, 40)
    replayed = [Launch(one.name, one.start_us, one.length_us, "other", 0) for one in STEP]
    told = iter([([Token(replayed, 50.0)], 0), ([Token(stepped, 50.0)], 0)])
    monkeypatch.setattr(trace, "_profiled", lambda work, where: next(told))
    token, attributed_by, disagreement, _ = trace._of_graph(decoder, runtime, "cuda", plain_parts(model))
    assert (attributed_by, [launch.part for launch in token.launches]) == want
    assert (disagreement is not None) == (len(stepped) == 3)


def test_by_name_changes_nothing_but_the_part() -> None:
    assert [launch.name for launch in by_name(STEP)] == [launch.name for launch in STEP]


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
