"""task=kernel on a tiny shape, in Triton's interpreter: every kernel is checked and timed, a wrong one is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adafuse import cell, records, stages
from adafuse.bench import device, kernel
from adafuse.bench.kernel_work import MERGES, STEPS, Case, Draw, build, sizes_of
from adafuse.config import Config, Dtype
from adafuse.kernels import fused, gather, route, switch
from adafuse.kernels.config import FUSED_MAX_BATCH
from adafuse.refusals import KERNEL_TARGETS, KERNELS
from synthetic.configurations import compose

RUN = {
    "task": "kernel",
    "cell_id": "c",
    "config_hash": "0",
    "config": {},
    "machine": {},
    "schema": records.SCHEMA,
}
# 2 blocks, two key-value heads: q, k and v differ; linears of two widths
SHAPE = {
    "model.shape.hidden_size": 32,
    "model.shape.intermediate_size": 48,
    "model.shape.num_hidden_layers": 2,
    "model.shape.num_key_value_heads": 2,
}
WHOLE = ("expand_all", "gather", "gather_routed", "dense")
WEIGHTS = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48)  # elements of all linears of both blocks


def configured(*overrides: str) -> Config:
    quick = ["kernel.ranks=[4]", "kernel.tokens=[1,5]", "kernel.targets=[qv,all]", "kernel.replays=1"]
    tiny = [f"{key}={value}" for key, value in SHAPE.items()]
    return compose("task=kernel", "experts.count=4", *quick, *tiny, *overrides)


def measure(tmp_path: Path, *overrides: str) -> records.Record:
    path = tmp_path / "kernel.jsonl"
    with records.open_record(path, RUN) as record:
        kernel.run(configured(*overrides), "cpu", record)
    return records.read(path)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)


@pytest.fixture(scope="module", params=["float32", "float16"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> records.Record:
    """A record of every case, 10 seconds in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(device.BUFFER_MIB, "cpu", 4)
        return measure(tmp_path_factory.mktemp("whole"), f"model.dtype={request.param}")


def test_every_kernel_is_checked_and_timed(whole: records.Record) -> None:
    record, lines = whole, whole.of("kernel")
    assert record.status == "ok", record.of("error")
    found = {(line["kernel"], line["targets"], line["rank"], line["tokens"]) for line in lines}
    assert len(found) == len(lines)
    assert found == {
        *((name, targets, 4, None) for name in ("switch", "rebase") for targets in ("qv", "all")),
        *((name, "all", 4, tokens) for name in WHOLE[:4] for tokens in (1, 5)),
        *((name, "all", None, tokens) for name in ("library_linear", "route") for tokens in (1, 5)),
        *(("shrink_expand", "all", 4, 1), ("fused", "all", 4, 1), ("linear", "all", None, 1)),
    }
    for line in lines:
        assert line["passed"] and 0 <= line["error"] <= line["bound"], line
        assert line["ms"] > 0 and line["floor_ms"] > 0 and line["model"] == "tiny"
        assert line["dtype"] == lines[0]["dtype"] in ("float32", "float16")
        assert (line["naive_ms"] is None) == (line["kernel"] in ("dense", "library_linear"))
        assert line["gbps"] == pytest.approx(line["bytes"] / line["ms"] / 1e6)
    # worth something in a dtype whose rounding is coarse, too: one expert of two left out is an error of half or so
    assert max(line["bound"] for line in lines) < 0.1


def test_floors_are_the_bytes_over_the_right_bandwidth(tmp_path: Path) -> None:
    record = measure(tmp_path, "kernel.kernels=[switch,linear]", "kernel.targets=[all]")
    (bandwidth,) = record.of("calibration")
    for line, key in zip(record.of("kernel"), ("copy_gbps", "read_gbps"), strict=True):
        assert line["floor_ms"] == pytest.approx(line["bytes"] / bandwidth[key] / 1e6)
        assert line["share"] == pytest.approx(line["gbps"] / bandwidth[key])


def test_bytes_are_what_must_move(whole: records.Record) -> None:
    lines = whole.of("kernel")
    size = {"float32": 4, "float16": 2}[lines[0]["dtype"]]
    bytes_of = {(li["kernel"], li["targets"], li["tokens"]): li["bytes"] for li in lines}
    # A and B of one expert of rank 4 on every linear; the rows of a router per linear are rounded like A
    inputs, outputs = 2 * (4 * 32 + 2 * 32 + 48), 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    one, routers = size * 4 * (inputs + outputs), size * 4 * inputs
    weights = size * WEIGHTS
    assert bytes_of["switch", "all", None] == 2 * weights + 4 * one
    assert bytes_of["rebase", "all", None] == 2 * weights + 2 * one
    # one token takes 2 of 4 experts; of those that share an input, A is counted once per linear
    assert bytes_of["shrink_expand", "all", 1] == 2 * one
    up, all_down = size * 4 * outputs, 4 * size * 4 * inputs
    assert bytes_of["expand_all", "all", 1] == 2 * up
    assert bytes_of["expand_all", "all", 5] == pytest.approx(4 * (1 - 0.5**5) * up, abs=1)
    assert bytes_of["gather", "all", 1] == weights + all_down + 2 * up
    assert bytes_of["gather_routed", "all", 1] == weights + all_down + routers + 2 * up
    assert bytes_of["dense", "all", 1] == bytes_of["dense", "all", 5] == weights + 4 * one
    assert bytes_of["fused", "all", 1] == weights + 2 * one
    assert bytes_of["linear", "all", 1] == bytes_of["library_linear", "all", 5] == weights
    assert bytes_of["route", "all", 1] == 2 * 4 * 4 * 32
    shapes = {(li["kernel"], li["targets"]): li["shape"] for li in lines}
    assert shapes["switch", "qv"] == "2 x [q: 32 -> 32, v: 32 -> 16]"
    assert shapes["gather", "all"] == "2 x [q,k,v: 32 -> 64, o: 32 -> 32, gate,up: 32 -> 96, down: 48 -> 32]"
    assert shapes["route", "all"] == "2 x [router: 32 -> 4]"


def scaled(module, name: str, factor: float = 1.5):
    """The kernel with its second argument off by a factor."""
    original = getattr(module, name)

    def wrong(first, second, *rest, **options):
        return original(first, factor * second, *rest, **options)

    return wrong


def minus_gates(module, name: str):
    """A merge with the sign of its gates the wrong way round."""
    original = getattr(module, name)
    return lambda plan, index, gate, *held: original(plan, index, -gate, *held)


MUTATIONS = [
    ("switch", switch, "switch_", minus_gates),
    ("rebase", switch, "rebase_", minus_gates),
    ("shrink_expand", gather, "expand_", scaled),
    ("expand_all", gather, "expand_all_", scaled),
    ("gather", gather, "expand_all_", scaled),
    ("gather_routed", gather, "expand_routed_", scaled),
    ("fused", fused, "fused", scaled),
    ("linear", fused, "linear", scaled),
    ("route", route, "route", scaled),
]


@pytest.mark.parametrize(("name", "module", "function", "mutate"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_a_kernel_with_a_wrong_result_is_recorded_and_not_timed(
    name, module, function, mutate, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(module, function, mutate(module, function))
    others = "library_linear"
    record = measure(
        tmp_path, f"kernel.kernels=[{name},{others}]", "kernel.tokens=[1]", "model.dtype=float16"
    )
    for line in record.of("kernel"):
        right = line["kernel"] == others
        assert line["passed"] is right
        timed = [line[key] is not None for key in ("ms", "gbps", "share")]
        assert timed == [right] * 3 and (right or line["naive_ms"] is None)
    assert record.status == "ok", "a wrong kernel is a result, not a failure of the cell"


def test_what_a_kernel_leaves_unwritten_is_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fused, "linear", lambda x, weight, bias: torch.empty(len(x), len(weight)))
    record = measure(tmp_path, "kernel.kernels=[linear]", "kernel.tokens=[1]")
    (line,) = record.of("kernel")
    assert (line["passed"], line["error"], line["ms"]) == (False, None, None)


def test_a_kernel_that_raises_does_not_keep_the_others_from_running(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("no such rank")

    monkeypatch.setattr(switch, "plan", refuse)
    record = measure(tmp_path, "kernel.kernels=[switch,route]", "kernel.tokens=[1]")
    assert [line["kernel"] for line in record.of("kernel")] == ["route"]
    assert record.status == "error" and all("no such rank" in line["message"] for line in record.of("error"))


def test_no_two_blocks_share_operands() -> None:
    sizes, case = sizes_of(configured()), Case("gather", "all", 4, 3)
    draw = Draw(sizes, "cpu", torch.float32, torch.Generator().manual_seed(0))
    work = build(case, draw)
    wanted = [want for _, want in work.check()]
    assert len(wanted) == 8, "four projections of the first block and of the last"
    assert not torch.equal(wanted[0], wanted[4])


@pytest.mark.parametrize("model", ["llama2_7b", "llama3_8b", "mistral_7b", "qwen2_5_7b", "tiny", "small"])
def test_sizes_are_those_of_the_model(model: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = compose(f"model={model}")
    shape = dict(config.model.shape)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    sizes, block = sizes_of(config), built.model.layers[-1]
    assert sizes.blocks == len(built.model.layers)
    for name, size in sizes.linears.items():
        part = block.self_attn if hasattr(block.self_attn, name) else block.mlp
        assert tuple(getattr(part, name).weight.shape) == size, name


def test_the_names_that_the_configuration_takes_are_the_ones_that_are_known() -> None:
    config = compose("experiment=kernels", "profile=gpu")
    assert config.kernel.kernels == list(KERNELS), "no kernel that no experiment times"
    assert config.kernel.targets == list(KERNEL_TARGETS)
    timed = {case.kernel for case in kernel.cases(config.kernel)}
    assert timed == set(KERNELS) == {*MERGES, *STEPS}
    few = [c.tokens for c in kernel.cases(config.kernel) if c.kernel in ("fused", "linear")]
    assert max(few) <= FUSED_MAX_BATCH


def test_without_a_gpu_it_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = replace(configured("device=cpu"), runs_dir=str(tmp_path))
    assert not list(cell.needs(config)), "kernels need no backbone, only its shape"
    with pytest.raises(ValueError, match="task=kernel times GPU kernels and this machine has no CUDA device"):
        stages.run(config, "test")
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    "override", ["kernels=[swich]", "targets=[kv]", "ranks=[]", "tokens=[0]", "replays=0"]
)
def test_what_cannot_be_timed_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(ValueError, match="kernel." + override.split("=")[0]) as caught:
        compose(f"kernel.{override}")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_on_a_gpu_a_pass_is_a_graph_and_bf16_is_right(tmp_path: Path) -> None:
    config = configured("device=cuda", "kernel.replays=3")
    config.model.dtype = Dtype.bfloat16
    with records.open_record(tmp_path / "kernel.jsonl", RUN) as record:
        kernel.run(config, "cuda", record)
    done = records.read(tmp_path / "kernel.jsonl")
    assert done.status == "ok", done.of("error")
    assert all(line["passed"] and line["ms"] > 0 for line in done.of("kernel")), done.of("kernel")
