"""Made-up traces, as a GPU's profiler would write them: launches find their parts by scope, replay order or name."""

from pathlib import Path

import pytest

from adafuse.bench import trace
from adafuse.bench.trace_parts import (
    MARK,
    PREFIX,
    Launch,
    Token,
    by_name,
    by_replay_order,
    part_of_name,
    parts_ms,
    plain_parts,
    tokens_of,
)
from adafuse.config import Runtime, StrategyName
from adafuse.engine.make import make


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
    decoder = make(model, None, StrategyName.dense, Runtime.graph, 40)
    replayed = [Launch(one.name, one.start_us, one.length_us, "other", 0) for one in STEP]
    told = iter([([Token(replayed, 50.0)], 0), ([Token(stepped, 50.0)], 0)])
    monkeypatch.setattr(trace, "_profiled", lambda work, where: next(told))
    token, attributed_by, disagreement, _ = trace._of_graph(decoder, runtime, "cuda", plain_parts(model))
    assert (attributed_by, [launch.part for launch in token.launches]) == want
    assert (disagreement is not None) == (len(stepped) == 3)


def test_by_name_changes_nothing_but_the_part() -> None:
    assert [launch.name for launch in by_name(STEP)] == [launch.name for launch in STEP]
