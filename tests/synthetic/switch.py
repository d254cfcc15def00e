"""Weights and factors of a switch, what naive.py makes of them, and how near the kernel must come."""

import pytest
import torch
from torch import Tensor

from adafuse.kernels import naive, switch
from adafuse.kernels.config import SwitchConfig

WHERE = [
    pytest.param("cpu", torch.float32, id="cpu-fp32"),
    pytest.param("cpu", torch.float16, id="cpu-fp16"),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu, id="cuda-bf16"),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu, id="cuda-fp16"),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu, id="cuda-fp32"),
]
# (O, I) of the linears, E, R, S: whole tiles, one odd everything, rank above 16 and no power of two, one slot
SHAPES = [
    ([(64, 128), (128, 256)], 4, 16, 4),
    ([(70, 130), (33, 200), (1, 8)], 3, 5, 2),
    ([(130, 72)], 5, 40, 3),
    ([(40, 33)], 1, 1, 1),
]


class Case:
    """Weights, clean weights, factors, slots and gates, drawn from a fixed seed; the plan is made of all of them."""

    def __init__(self, linears, experts, rank, slots, device, dtype) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=draw) * scale).to(device, dtype)

        self.weights = [normal(*shape) for shape in linears]
        self.clean = [normal(*shape) for shape in linears]
        self.lora_A = [normal(experts, rank, i) for _, i in linears]
        self.lora_B = [normal(experts, o, rank, scale=rank**-0.5) for o, _ in linears]
        # with fewer experts than slots some expert stands in two of them
        self.index = torch.randint(0, experts, (slots,), generator=draw).to(device)
        self.gate = torch.randn(slots, generator=draw).to(device)
        # of the selection before: something, so that a rebase has to write
        self.held = torch.ones(slots, device=device)

    def plan(self, config: SwitchConfig | None = None) -> switch.SwitchPlan:
        return switch.plan(self.weights, self.clean, self.lora_A, self.lora_B, config)

    def expected(self, index: Tensor, gate: Tensor, source: list[Tensor]) -> list[Tensor]:
        """naive.py in the dtype of the weights, from a copy of `source`."""
        weights = [weight.clone() for weight in source]
        naive.switch_(weights, self.lora_A, self.lora_B, index, gate)
        return weights

    def terms(self) -> list[Tensor]:
        """The sums of the absolute values of what a switch adds: what rounding a factor is relative to."""
        factors = ([t.abs().float() for t in factor] for factor in (self.lora_A, self.lora_B))
        sums = [torch.zeros(weight.shape, device=weight.device) for weight in self.weights]
        naive.switch_(sums, *factors, self.index, self.gate.abs())
        return sums


def worst_error(got: list[Tensor], wanted: list[Tensor], terms: list[Tensor]) -> float:
    """Largest difference over the tolerance; above one is a failure, and so is anything that is not a number.

    Both sides sum in fp32 and round once: two neighbouring values of the dtype may differ by one unit, eps * |value|,
    and fp32 sums of up to S * R terms in another order by some units of fp32. The kernel also rounds gate * A to the
    dtype, by half a unit of each term.
    """
    worst = 0.0
    for left, right, added in zip(got, wanted, terms, strict=True):
        eps = torch.finfo(left.dtype).eps
        # results that nearly cancel keep the error of their terms, which are below 100 here
        allowed = eps * (right.float().abs() + added / 2) + 256 * torch.finfo(torch.float32).eps
        ratio = ((left.float() - right.float()).abs() / allowed).max().item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst
