"""kernels/fused.py against naive.py: odd sizes, strided x, columns without experts, poisoned memory."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from adafuse.kernels import fused as kernels
from adafuse.kernels import naive
from adafuse.kernels.config import FUSED_MAX_BATCH, GemvConfig, fit_gemv
from synthetic.fused import (
    CASES,
    DEVICE,
    EXPERTS,
    MACHINES,
    agrees,
    flags_of,
    poison,  # noqa: F401  # autouse
    problem,
)


@pytest.mark.parametrize("sizes", [case.values for case in CASES], ids=[case.id for case in CASES])
@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_linear(device, dtype, sizes):
    args = problem(device, dtype, *sizes)
    for bias in (args["bias_O"], None):
        got = kernels.linear(args["x_TI"], args["weight_OI"], bias)
        assert agrees(got, naive.linear(args["x_TI"], args["weight_OI"], bias))
    # with the bias, the comparison sees that `got` has none
    assert not agrees(got, naive.linear(args["x_TI"], args["weight_OI"], args["bias_O"]))


@pytest.mark.parametrize("sizes", [case.values for case in CASES], ids=[case.id for case in CASES])
@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_fused(device, dtype, sizes):
    args = problem(device, dtype, *sizes)
    assert agrees(kernels.fused(**args, flags=flags_of(args["x_TI"]), turn=0), naive.fused(**args))


def swapped_experts(args):
    return args | {"index_TK": (args["index_TK"] + 1) % EXPERTS}


def without_gates(args):
    return args | {"weight_TK": torch.ones_like(args["weight_TK"])}


def negated(args):
    return args | {"scaling": -args["scaling"]}


def swapped_members(args):
    (first, width), (second, _), *rest = args["members"]
    return args | {"members": [(second, width), (first, width), *rest]}


@cache
def right():
    """Arguments in half precision and the kernel's result, which several tests look at."""
    args = problem(DEVICE, torch.float16, *CASES[1].values)
    return args, kernels.fused(**args, flags=flags_of(args["x_TI"]), turn=0)


@pytest.mark.parametrize("mutate", [swapped_experts, without_gates, negated, swapped_members])
def test_a_wrong_meaning_is_seen(mutate):
    args, got = right()
    assert agrees(got, naive.fused(**args))
    assert not agrees(got, naive.fused(**mutate(args)))


def test_int32_indices_and_a_transposed_x():
    args = problem(DEVICE, torch.float32, *CASES[0].values)
    args |= {"index_TK": args["index_TK"].int(), "x_TI": args["x_TI"].T.contiguous().T, "bias_O": None}
    assert agrees(kernels.fused(**args, flags=flags_of(args["x_TI"]), turn=0), naive.fused(**args))


def test_every_program_that_raises_the_flag_comes_before_the_first_that_waits():
    """The interpreter runs programs in order: one that waited for a later one would hang, so the flag is counted."""
    tokens, top_k, rank, _, _, members = sizes = CASES[1].values
    args = problem(DEVICE, torch.float32, *sizes)
    flags = flags_of(args["x_TI"])
    config = GemvConfig(rows=4, tiles=2, block=512, warps=4)
    assert agrees(kernels.fused(**args, flags=flags, turn=0, config=config), naive.fused(**args))
    assert flags.tolist() == [tokens * top_k * len(members) * rank, 0]


def test_launches_that_take_turns_need_nobody_to_clear_their_flags():
    args = problem(DEVICE, torch.float32, *CASES[2].values)
    want, flags = naive.fused(**args), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for launch in range(7):
        assert flags[launch % 3] == 0, "lowered by the launch before"
        assert agrees(kernels.fused(**args, flags=flags, turn=launch % 3), want)
    with pytest.raises(ValueError, match="at least two int32"):
        kernels.fused(**args, flags=flags[:1], turn=0)


def test_rows_of_a_program_belong_to_one_member():
    config = GemvConfig(rows=8, tiles=4, block=2048, warps=4)
    for edges in ([4096, 0, 4096], [96, 0, 24, 24, 72], [7, 0, 7], [18944, 0, 512]):
        cut = fit_gemv(config, 4096, edges)
        assert all(edge % (cut.rows * cut.tiles) == 0 for edge in edges)


@pytest.mark.parametrize(("in_features", "block"), [(4096, 2048), (3584, 512), (14336, 2048), (11008, 2048)])
def test_a_block_divides_the_input_where_it_can(in_features, block):
    config = GemvConfig(rows=2, tiles=1, block=2048, warps=4)
    assert fit_gemv(config, in_features, [4096]).block == block


def test_refusals():
    args = problem(DEVICE, torch.float32, *CASES[0].values)
    flags, many = flags_of(args["x_TI"]), torch.zeros(FUSED_MAX_BATCH + 1, 256, device=DEVICE)
    with pytest.raises(ValueError, match="gather"):
        kernels.linear(many, args["weight_OI"], None)
    with pytest.raises(ValueError, match="gather"):
        kernels.fused(**args | {"x_TI": many}, flags=flags, turn=0)
    with pytest.raises(ValueError, match="4 members"):
        kernels.fused(**args | {"members": [(0, 16)] * 4}, flags=flags, turn=0)
    with pytest.raises(ValueError, match="beyond"):
        kernels.fused(**args | {"members": [(0, 32), (32, 16), (56, 16)]}, flags=flags, turn=0)
    with pytest.raises(ValueError, match="not those of"):
        kernels.fused(**args | {"members": [(0, 32), (32, 16)]}, flags=flags, turn=0)


def test_kernels_compile_for_a_gpu():
    """In a process of its own: this one may interpret."""
    script = Path(__file__).with_name("aot_fused.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
