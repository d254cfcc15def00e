"""The switch kernel against naive.py: odd sizes, poisoned weights, round trips, refusals, compiled code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adafuse.kernels import switch
from adafuse.kernels.config import SwitchConfig
from synthetic.switch import SHAPES, WHERE, Case, worst_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}-E{shape[1]}-R{shape[2]}-S{shape[3]}")
def case(request: pytest.FixtureRequest, device: str, dtype: torch.dtype) -> Case:
    return Case(*request.param, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_switch_adds_to_what_the_weights_hold(case: Case) -> None:
    wanted = case.expected(case.index, case.gate, case.weights)
    switch.switch_(case.plan(), case.index, case.gate)
    assert worst_error(case.weights, wanted, case.terms()) <= 1


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_rebase_overwrites_and_leaves_the_clean_weights_alone(case: Case) -> None:
    wanted = case.expected(case.index, case.gate, case.clean)
    before = [weight.clone() for weight in case.clean]
    for weight in case.weights:
        weight.fill_(float("nan"))
    switch.rebase_(case.plan(), case.index.int(), case.gate, case.held)
    assert worst_error(case.weights, wanted, case.terms()) <= 1
    assert all(torch.equal(left, right) for left, right in zip(case.clean, before, strict=True))


@pytest.mark.parametrize("slot", [0, -1])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_of_a_slot_without_a_gate_no_factor_counts(device: str, dtype: torch.dtype, slot: int) -> None:
    """Whatever stands there: such a slot names any expert."""
    case = Case(*SHAPES[0], device, dtype)
    unused = next(e for e in range(len(case.lora_A[0])) if e not in case.index.tolist())
    case.gate[slot] = 0.0
    wanted = case.expected(case.index, case.gate, case.weights)
    case.index[slot] = unused
    for factor in case.lora_A:
        factor[unused] = float("nan")
    for factor in case.lora_B:
        factor[unused] = float("nan")
    switch.switch_(case.plan(), case.index, case.gate)
    assert worst_error(case.weights, wanted, case.terms()) <= 1


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_a_wrong_meaning_is_noticed(device: str, dtype: torch.dtype) -> None:
    case = Case(*SHAPES[0], device, dtype)
    gate = case.gate.clone()
    gate[0] = 0.0
    mutants = {
        "old experts added instead of subtracted": (case.index, -case.gate),
        "gates missing": (case.index, torch.ones_like(case.gate)),
        "one slot missing": (case.index, gate),
        "neighbouring expert": ((case.index + 1) % 4, case.gate),
    }
    wrong = {name: case.expected(*arguments, case.weights) for name, arguments in mutants.items()}
    switch.switch_(case.plan(), case.index, case.gate)
    unnoticed = [
        name for name, weights in wrong.items() if worst_error(case.weights, weights, case.terms()) <= 1
    ]
    assert not unnoticed


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_switching_there_and_back_returns_to_the_weights_up_to_one_rounding_each(device, dtype) -> None:
    case = Case(*SHAPES[0], device, dtype)
    before = [weight.clone() for weight in case.weights]
    plan = case.plan()
    switch.switch_(plan, case.index, case.gate)
    # Each rounding is half a unit of the largest value on the way. Below fp32 there is one a switch; in fp32
    # the compiler lets the sum begin with the weight, so that every one of its terms rounds.
    terms = case.lora_A[0].shape[1] * len(case.gate) if dtype == torch.float32 else 0
    largest = max(weight.float().abs().max().item() for weight in [*case.weights, *case.terms()])
    switch.switch_(plan, case.index, -case.gate)
    moved = max((a.float() - b.float()).abs().max().item() for a, b in zip(case.weights, before, strict=True))
    assert moved <= (1 + terms) * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_a_weight_may_end_anywhere_in_a_strip(tiles: int) -> None:
    case = Case([(150, 70)], 2, 8, 2, "cpu", torch.float32)
    wanted = case.expected(case.index, case.gate, case.weights)
    config = SwitchConfig(32, 128, tiles, warps=4)
    switch.switch_(case.plan(config), case.index, case.gate)
    assert worst_error(case.weights, wanted, case.terms()) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 16, 64, 128])
def test_a_captured_switch_follows_the_slots_in_device_memory(rank: int) -> None:
    case = Case([(1024, 2048), (2816, 1024)], 8, rank, 4, "cuda", torch.bfloat16)
    plan = case.plan()
    switch.rebase_(plan, case.index, case.gate, case.held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        switch.rebase_(plan, case.index, case.gate, case.held)
    case.index.copy_((case.index + 3) % 8)
    case.gate.neg_()
    graph.replay()
    assert worst_error(case.weights, case.expected(case.index, case.gate, case.clean), case.terms()) <= 1


def refused(message: str, **changes: object) -> None:
    case = Case([(32, 48)], 2, 4, 2, "cpu", torch.float32)
    arguments = {name: getattr(case, name) for name in ("weights", "clean", "lora_A", "lora_B")} | changes
    with pytest.raises(ValueError, match=message):
        switch.plan(**arguments)


def test_plan_refuses_what_the_kernel_could_not_read() -> None:
    refused("one dtype", weights=[torch.zeros(32, 48, dtype=torch.float16)])
    refused("one dtype", lora_A=[torch.zeros(2, 4, 48, device="meta")])
    refused("contiguous", weights=[torch.zeros(48, 32).T])
    refused("multiples of 16 bytes", clean=[torch.zeros(32 * 48 + 1)[1:].view(32, 48)])
    refused("shapes", lora_B=[torch.zeros(2, 32, 8)])
    refused("shapes", clean=[torch.zeros(48, 32)])
    refused("as many", weights=[])
    refused("as many", lora_A=[])
    refused("ranks up to", lora_A=[torch.zeros(2, 256, 48)], lora_B=[torch.zeros(2, 32, 256)])


def test_a_launch_refuses_gates_that_do_not_fit_and_a_rebase_without_clean_weights() -> None:
    case = Case([(32, 48)], 2, 4, 2, "cpu", torch.float32)
    with pytest.raises(ValueError, match="one fp32 gate per slot"):
        switch.switch_(case.plan(), case.index, case.gate.double())
    with pytest.raises(ValueError, match="one fp32 gate per slot"):
        switch.switch_(case.plan(), case.index, case.gate[:1])
    with pytest.raises(ValueError, match="clean weights"):
        switch.rebase_(
            switch.plan(case.weights, None, case.lora_A, case.lora_B), case.index, case.gate, case.held
        )


def test_it_compiles_to_128_bit_accesses_for_two_gpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    script = [sys.executable, str(ROOT / "tests/kernels/aot_switch.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
