"""How shrink and the expands are launched: default configurations, full devices, captured graphs, compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adafuse.kernels import gather
from adafuse.kernels.config import (
    FEW_TOKENS,
    MULTIPROCESSORS,
    expand_config,
    output_tiles,
    shrink_config,
)
from synthetic.gather import (
    SCALING,
    Case,
    _poison,  # noqa: F401  # autouse
    close,
    expanded,
    expanded_all,
    expanded_routed,
)


@pytest.mark.parametrize("tokens", [FEW_TOKENS - 1, FEW_TOKENS + 4])
def test_default_configurations_on_both_sides_of_the_threshold(tokens):
    case = Case(tokens, 2, 8, 16, 0, [(0, 40), (40, 24)], "cpu", torch.float32, shared=False)
    wanted = expanded_all(case)
    gather.expand_all_(case.y, case.u, case.lora_B, case.index_TGK, case.weight_TGK, case.members, SCALING)
    assert close(case.y, *wanted, torch.float32)
    case = Case(tokens, 2, 8, 16, 0, [(0, 40), (40, 24)], "cpu", torch.float32)
    wanted = expanded_routed(case, False)[:2]
    rest = (case.lora_B, case.members, case.top_k, False, SCALING)
    gather.expand_routed_(case.y, case.u, case.logits, *rest)
    assert close(case.y, *wanted, torch.float32)


def test_default_configurations_of_serial_adapters():
    case = Case(2, 2, 8, 16, 96, [(0, 40)], "cpu", torch.float32)
    y, rest = case.y.clone(), (case.index, case.weight, case.members, SCALING, True)
    gather.expand_(y, gather.shrink(case.x, case.lora_A, case.index), case.lora_B, *rest)
    assert close(y, *expanded(case, gelu=True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 17, 64, 100, 2048])
@pytest.mark.parametrize("rank", [7, 16, 64, 128])
@pytest.mark.parametrize("experts,top_k", [(2, 1), (8, 2), (16, 16)])
def test_configurations_are_launchable(tokens, rank, experts, top_k, dtype):
    c = expand_config(tokens, experts, rank, 4096, dtype.itemsize)
    assert all(block & (block - 1) == 0 for block in (c.block_t, c.block_o, c.block_c, c.warps)), c
    assert (c.block_t == 1) == (tokens <= FEW_TOKENS)
    assert c.block_t == 1 or min(c.block_t, c.block_o, c.block_c) >= 16, c
    assert c.block_t == 1 or c.block_c * 2 <= max(32, 2 * experts * rank), c
    held = (c.stages - 1) * (c.block_t + c.block_o) * c.block_c * dtype.itemsize
    assert c.block_t == 1 or held + c.block_t * c.block_c * dtype.itemsize <= 160 * 1024, c
    if tokens <= FEW_TOKENS:
        for rows, inputs in [(rank, 11008), (3 * rank, 4096), (3 * rank, 100)]:
            s = shrink_config(tokens, top_k, rows, inputs)
            assert 1 <= -(-inputs // (s.block_i * s.steps)) <= 8, s


def test_a_small_batch_fills_the_device():
    for tokens in (1, 8, 32):
        for members in ([(0, 4096)], [(0, 11008), (11008, 11008)]):
            outputs = sum(width for _, width in members)
            c = expand_config(tokens, 8, 16, outputs, 2)
            programs = output_tiles(members, c.block_o) * -(-tokens // c.block_t)
            assert 8 * programs >= 7 * MULTIPROCESSORS, c


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_captured_graph_follows_the_index(tokens):
    case = Case(tokens, 2, 8, 16, 0, [(0, 256), (512, 64)], "cuda", torch.bfloat16)
    y, outputs = case.product.clone(), case.y.shape[1]

    def step() -> None:
        y.copy_(case.product)
        rest = (case.lora_B, case.index_TGK, case.weight_TGK, case.members, SCALING)
        gather.expand_all_(y[:, :outputs], y[:, outputs : outputs + case.u.shape[1]], *rest)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    case.index_TGK.copy_((case.index_TGK + 1) % 8)
    graph.replay()
    assert close(y[:, :outputs], *expanded_all(case), torch.bfloat16)


def test_kernels_compile_for_gpus_with_wide_loads():
    script = Path(__file__).with_name("aot_gather.py")
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90") >= 20
    assert "expand_kernel routed" in done.stdout and "expand_all_kernel routed" in done.stdout
