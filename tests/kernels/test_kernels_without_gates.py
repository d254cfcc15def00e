"""A slot whose gate is exactly zero does no work in any kernel: NaN in its factors is never seen, bits are kept.

Cases and tolerances are those of test_gather.py, test_fused.py and test_switch.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adafuse.kernels import fused, gather, naive, switch
from synthetic.fused import CASES as FUSED_CASES
from synthetic.fused import MACHINES, agrees, flags_of, problem
from synthetic.gather import FEW, SCALING, close, expanded, expanded_all
from synthetic.gather import TYPES as GATHER_TYPES
from synthetic.gather import Case as Gathered
from synthetic.switch import SHAPES as SWITCH_SHAPES
from synthetic.switch import WHERE, worst_error
from synthetic.switch import Case as Merged


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of what is in memory: minus zero is not zero, and NaN is itself."""
    return [tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8) for tensor in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("device,dtype", GATHER_TYPES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gather_reads_and_adds_nothing_for_a_slot_without_a_gate(shared, device, dtype):
    case = Gathered(3, 2, 5, 7, 301, [(3, 70), (90, 33)], device, dtype, shared=shared)
    case.index_TGK.copy_(torch.tensor([2, 4]))
    case.weight_TGK[..., 1] = 0.0
    wanted = expanded_all(case)
    case.lora_B[4] = case.u.unflatten(1, (2, 5, 7))[:, :, 4] = float("nan")
    rest = (case.lora_B, case.index_TGK, case.weight_TGK, case.members, SCALING)
    found = case.y.clone()
    gather.expand_all_(found, case.u, *rest)
    assert close(found, *wanted, dtype)
    found = case.y.float()
    naive.expand_all_(found, case.u, *rest)
    assert close(found, *wanted, dtype)
    case.weight_TGK[..., 1] = 1e-30
    gather.expand_all_(case.y, case.u, *rest)
    assert case.y[:, 3:73].isnan().all(), "a small gate is a gate"


@pytest.mark.parametrize("device,dtype", GATHER_TYPES)
def test_a_slot_without_a_gate_is_none_for_serial_adapters_either(device, dtype):
    case = Gathered(*FEW[1].values, device, dtype)
    case.index.copy_(torch.tensor([2, 4]))
    case.weight[:, 1] = 0.0
    wanted, h = expanded(case, gelu=True), naive.shrink(case.x, case.lora_A, case.index)
    case.lora_B[4] = h[:, :, 1] = float("nan")
    rest = (case.lora_B, case.index, case.weight, case.members, SCALING, True)
    found = case.y.clone()
    gather.expand_(found, h, *rest)
    assert close(found, *wanted, dtype)
    naive.expand_(case.y, h, *rest)
    assert close(case.y, *wanted, dtype)


@pytest.mark.parametrize("device,dtype", GATHER_TYPES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("tokens", [3, 19])
def test_a_token_without_gates_keeps_its_bits(tokens, shared, device, dtype):
    """And the others of its batch are what they are without it. Above FEW_TOKENS every expert is read for somebody."""
    case = Gathered(tokens, 2, 5, 7, 0, [(3, 70), (90, 33)], device, dtype, shared=shared)
    alone = torch.arange(tokens, device=device) % 3 == 1
    case.weight_TGK[alone] = 0.0
    case.y[alone, 5:9] = -0.0
    wanted, size = expanded_all(case)
    case.u[alone] = float("nan")
    before = case.y.clone()
    rest = (case.u, case.lora_B, case.index_TGK, case.weight_TGK, case.members, SCALING)
    for expand_all_ in (gather.expand_all_, naive.expand_all_):
        found = before.clone()
        expand_all_(found, *rest)
        assert same(bits([found[alone]]), bits([before[alone]]))
        assert close(found[~alone], wanted[~alone], size[~alone], dtype)
        assert not torch.equal(found[~alone], before[~alone])


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_fused_reads_and_adds_nothing_for_a_slot_without_a_gate(device, dtype):
    args = problem(device, dtype, *FUSED_CASES[1].values)
    args["index_TK"].copy_(torch.tensor([[2, 3], [3, 0]]))
    args["weight_TK"].masked_fill_(args["index_TK"] == 3, 0.0)
    want = naive.fused(**args)
    for factor in ("lora_A_ECI", "lora_B_EOR"):
        args[factor][3] = float("nan")
    assert agrees(naive.fused(**args), want)
    assert agrees(fused.fused(**args, flags=flags_of(args["x_TI"]), turn=0), want)
    args["weight_TK"].masked_fill_(args["index_TK"] == 3, 1e-30)
    assert fused.fused(**args, flags=flags_of(args["x_TI"]), turn=0).isnan().any(), "a small gate is a gate"


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_fused_of_a_token_without_gates_is_the_backbones(device, dtype):
    """Bit for bit what factors of zero give; programs that wait are let through all the same."""
    args = problem(device, dtype, *FUSED_CASES[2].values)
    args["weight_TK"].zero_()
    zeros = {factor: torch.zeros_like(args[factor]) for factor in ("lora_A_ECI", "lora_B_EOR")}
    want = fused.fused(**args | zeros, flags=flags_of(args["x_TI"]), turn=0)
    for factor in zeros:
        args[factor].fill_(float("nan"))
    flags = flags_of(args["x_TI"])
    assert torch.equal(fused.fused(**args, flags=flags, turn=0), want)
    assert agrees(want, naive.linear(args["x_TI"], args["weight_OI"], args["bias_O"]))
    assert flags[0] > 0, "raised by every slot"


def spoil(case: Merged, *experts: int) -> None:
    for factor in (*case.lora_A, *case.lora_B):
        factor[[*experts]] = float("nan")


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_switch_reads_no_factors_of_a_slot_without_a_gate(device: str, dtype: torch.dtype, rank: int) -> None:
    case = Merged([(70, 130), (64, 128)], 6, rank, 4, device, dtype)
    case.index.copy_(torch.tensor([0, 4, 5, 2]))
    case.gate[[0, 2]] = torch.tensor([0.0, -0.0], device=device)
    wanted, rebased = (case.expected(case.index, case.gate, source) for source in (case.weights, case.clean))
    terms = case.terms()
    spoil(case, 0, 5)
    assert worst_error(case.expected(case.index, case.gate, case.weights), wanted, terms) <= 1, "naive.py too"
    switch.switch_(case.plan(), case.index, case.gate)
    assert worst_error(case.weights, wanted, terms) <= 1
    switch.rebase_(case.plan(), case.index, case.gate, case.held)
    assert worst_error(case.weights, rebased, terms) <= 1
    case.gate[0] = 1e-30
    switch.switch_(case.plan(), case.index, case.gate)
    assert case.weights[0].isnan().any(), "a small gate is a gate"


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_without_any_gate_switch_and_rebase_leave_a_weight_alone_or_put_it_back(
    device: str, dtype: torch.dtype
) -> None:
    case = Merged(*SWITCH_SHAPES[1], device, dtype)
    spoil(case, *range(3))
    for weights in (case.weights, case.clean):
        weights[0][3, :9] = -0.0
    none, plan, before = torch.tensor([0.0, -0.0], device=device), case.plan(), bits(case.weights)
    switch.switch_(plan, case.index, none)
    assert same(bits(case.weights), before)
    switch.rebase_(plan, case.index, none, none)
    assert same(bits(case.weights), before), "clean, as far as the gates say"
    switch.rebase_(plan, case.index, none, torch.tensor([0.0, 0.0, 0.5], device=device))
    assert same(bits(case.weights), bits(case.clean))


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_naive_means_the_same_without_any_gate(device: str, dtype: torch.dtype) -> None:
    case = Merged(*SWITCH_SHAPES[1], device, dtype)
    spoil(case, *range(3))
    none, before = torch.zeros(2, device=device), bits(case.weights)
    factors = case.lora_A, case.lora_B, case.index, none
    naive.switch_(case.weights, *factors)
    naive.rebase_(case.weights, case.clean, *factors, none)
    assert same(bits(case.weights), before)
    naive.rebase_(case.weights, case.clean, *factors, case.held)
    assert same(bits(case.weights), bits(case.clean))


@pytest.mark.gpu
def test_a_captured_rebase_restores_once_and_then_rests() -> None:
    """Tokens with experts and without, in one graph that reads gates in device memory; bits as from clean weights."""
    case = Merged([(1024, 2048), (2816, 1024)], 8, 16, 2, "cuda", torch.bfloat16)
    for weight, clean in zip(case.weights, case.clean, strict=True):
        weight.copy_(clean)
    plan, gates, held = case.plan(), case.gate.clone(), torch.zeros_like(case.gate)
    case.gate.zero_()

    def step() -> None:
        switch.rebase_(plan, case.index, case.gate, held)
        held.copy_(case.gate)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    case.gate.copy_(gates)
    switch.rebase_(plan, case.index, case.gate, case.held)
    merged = bits(case.weights)
    for weight, clean in zip(case.weights, case.clean, strict=True):
        weight.copy_(clean)
    for share in (1, 0, 0, 1, 1, 0):
        case.gate.copy_(share * gates)
        graph.replay()
        assert same(bits(case.weights), merged if share else bits(case.clean))
    # somebody else's bits show whether a token without experts behind another one writes
    case.weights[0][0, 0] = 7.0
    graph.replay()
    assert case.weights[0][0, 0] == 7.0
