"""kernels/lean.py: every launch of a lean step against its meaning, at odd sizes, with poisoned memory."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from adafuse.kernels import lean
from adafuse.kernels.config import LeanCut, fit_lean, lean_cut
from synthetic import interpreter
from synthetic.fused import DEVICE, MACHINES
from synthetic.lean import KINDS, Case

# by how many tokens: each kernel in several tiles, with and without tensor cores
CUTS = {
    1: LeanCut(rows=4, block=32, warps=4, front_rows=2, tiles=2),
    2: LeanCut(rows=8, block=64, warps=2),
    5: LeanCut(rows=32, block=32, warps=4, stages=2, front_rows=16),
}


@pytest.fixture(autouse=True)
def _within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are the sanitizer's."""
    if DEVICE == "cpu":
        interpreter.bound(monkeypatch, lean, "product_kernel")


@pytest.mark.parametrize("routed", [False, True], ids=["known", "routed"])
@pytest.mark.parametrize("tokens", CUTS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_a_product_with_experts(device, dtype, name: str, tokens: int, routed: bool) -> None:
    if device == "cpu" and dtype is torch.float16 and routed:
        pytest.skip("what is chosen is fp32 whatever the operands are; the interpreter takes its time")
    case = Case(KINDS[name], tokens, device, dtype, routed, CUTS[tokens])
    # programs run in another order each time where they run at once
    assert all(case.agrees(case.launch(), case.meaning()) for _ in range(1 if device == "cpu" else 50))


@pytest.mark.skipif(
    DEVICE == "cuda", reason="where programs run at once the test above finds them in any order"
)
@pytest.mark.parametrize("routed", [False, True], ids=["known", "routed"])
@pytest.mark.parametrize("tokens", CUTS)
@pytest.mark.parametrize("name", ["q,k,v", "up of gate,up", "wide", "serial"])
def test_who_comes_first_waits(name: str, tokens: int, routed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.late(monkeypatch, lean, "product_kernel")
    case = Case(KINDS[name], tokens, DEVICE, torch.float32, routed, CUTS[tokens])
    assert case.agrees(case.launch(), case.meaning())


@pytest.mark.parametrize("tokens", CUTS)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "serial"])
@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_a_product_without(device, dtype, name: str, tokens: int) -> None:
    case = Case(KINDS[name], tokens, device, dtype, False, CUTS[tokens])
    assert case.agrees(case.launch(experts=False), case.meaning(experts=False))


@pytest.mark.parametrize(("name", "tokens"), [("gate,up", 1), ("gate,up", 5), ("wide", 1), ("wide", 2)])
def test_a_token_without_gates_reads_no_expert(name: str, tokens: int) -> None:
    """Neither the A nor the B of an expert that nobody has, which may hold anything; its number says nothing."""
    case = Case(KINDS[name], tokens, DEVICE, torch.float32, False, CUTS[tokens])
    case.index.clamp_(max=2)
    case.weight_TK[-1] = 0.0
    case.B[3] = torch.nan
    if tokens <= 2:
        case.A[:, 3] = torch.nan
    want = case.meaning(experts=False)
    for number in (3, -1):
        case.index[-1] = number
        assert case.agrees({"y": case.launch()["y"][-1]}, {"y": want["y"][-1]})


@pytest.mark.parametrize(
    ("device", "dtype"), [one for one in MACHINES if one.values != ("cpu", torch.float32)]
)
@pytest.mark.parametrize(("name", "tokens"), [("q,k,v", 1), ("q,k,v", 2), ("wide", 2)])
def test_nobody_waits_for_what_is_not_a_number(device, dtype, name: str, tokens: int) -> None:
    """Of any bits: it is handed on, in its token alone."""
    case = Case(KINDS[name], tokens, device, dtype, False, CUTS[tokens])
    case.x[0].view(torch.int16).fill_(-1)
    assert case.launch()["y"].isnan().all(1).tolist() == [True, False][:tokens]


def test_what_is_asked_for_early_is_the_same() -> None:
    case = Case(KINDS["q,k,v"], 1, DEVICE, torch.float32, False, CUTS[1])
    assert torch.equal(case.launch(ready=True)["y"], case.launch()["y"])


@cache
def right(name: str, tokens: int) -> tuple[Case, dict[str, torch.Tensor]]:
    case = Case(KINDS[name], tokens, DEVICE, torch.float16, False, CUTS[tokens])
    return case, case.launch()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        *(("q,k,v", what) for what in ("norm", "bias", "expert", "gate", "member", "sign")),
        *(("gate,up", what) for what in ("norm", "bias", "expert", "gate", "member", "gated")),
        *(("down", what) for what in ("expert", "gate", "sign", "next")),
    ],
)
def test_a_wrong_meaning_is_seen(name: str, mutation: str, tokens: int) -> None:
    case, got = right(name, tokens)
    assert case.agrees(got, case.meaning())
    assert not case.agrees(got, case.meaning(mutate=mutation))


def test_no_program_has_rows_of_two_members() -> None:
    qwen = [(0, 3584), (3584, 512), (4096, 512)]
    for tokens in (1, 8):
        cut = fit_lean(lean_cut(tokens, 3584, 4608, False, "known"), 3584, 4608, qwen, False)
        assert all(edge % cut.rows == 0 for edge in (3584, 4096)) and cut.rows >= (16 if tokens > 2 else 1)
    assert fit_lean(LeanCut(64, 128, 4), 50, 37, [(0, 37)], False).rows == 64, "one member may end anywhere"
    assert fit_lean(LeanCut(16, 128, 4), 64, 48, [(0, 24), (24, 24)], False).rows == 8
    cut = fit_lean(LeanCut(4, 128, 4, tiles=4), 64, 36, [], False)
    assert cut.tiles == 1, "nine tiles are no whole number of programs of two"


@pytest.mark.slow
def test_launches_compile_for_a_gpu() -> None:
    """In a process of its own: this one may interpret."""
    script = Path(__file__).with_name("aot_lean.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
