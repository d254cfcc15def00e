"""Operands of a lean step's launches, and what the launches mean, in fp32 and a few lines of PyTorch each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adafuse.kernels import beside, lean
from adafuse.kernels.config import LeanCut, Members

EXPERTS, EPS, SCALING = 4, 1e-5, 2.0


@dataclass
class Kind:
    """One launch: its sizes, and what is done around the product."""

    inputs: int
    outputs: int
    members: Members
    rank: int = 4
    top_k: int = 2
    gated: bool = False
    residual: bool = False
    normed: bool = True
    bias: bool = False
    serial: bool = False


KINDS = {
    "q,k,v": Kind(64, 64, [(0, 32), (32, 16), (48, 16)], bias=True),
    "q,v of q,k,v": Kind(80, 64, [(0, 32), (48, 16)], rank=5, top_k=1),
    "gate,up": Kind(72, 96, [(0, 48), (48, 48)], rank=8, gated=True, bias=True),
    "up of gate,up": Kind(48, 70, [(35, 35)], rank=3, top_k=3, gated=True),
    "down": Kind(96, 40, [(0, 40)], rank=16, residual=True, normed=False),
    "odd": Kind(50, 37, [(0, 37)], residual=True, normed=False, bias=True),
    # of 128 terms a row and more, which are read several at once; not a power of two, so that some are nobody's
    "wide": Kind(64, 64, [(0, 32), (48, 16)], rank=48, top_k=3),
    "serial": Kind(40, 40, [(0, 40)], rank=6, residual=True, normed=False, serial=True),
}


class Case:
    """Random operands of one launch, seeded; experts are as large as the product."""

    def __init__(
        self, kind: Kind, tokens: int, device: str, dtype: torch.dtype, routed: bool, cut: LeanCut | None
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator) * std).to(device, to)

        self.kind, self.tokens, self.dtype = kind, tokens, dtype
        inputs, outputs, rank, groups = kind.inputs, kind.outputs, kind.rank, len(kind.members)
        self.x = normal(tokens, inputs)
        self.weight = None if kind.serial else normal(outputs, inputs, std=inputs**-0.5)
        self.bias = normal(outputs) if kind.bias else None
        self.squares = normal(tokens, 3, to=torch.float32).square() * inputs
        self.sum = normal(tokens, outputs, to=torch.float32)
        self.norm_weight = normal(outputs)
        self.A = normal(groups, EXPERTS, rank, inputs, std=inputs**-0.5)
        self.B = normal(EXPERTS, sum(width for _, width in kind.members), rank, std=rank**-0.5)
        # far apart, so that no rounding turns a choice over
        self.router = normal(groups, EXPERTS, inputs, std=4 * inputs**-0.5)
        chosen = [torch.randperm(EXPERTS, generator=generator)[: kind.top_k] for _ in range(tokens)]
        self.index, self.weight_TK = torch.stack(chosen).to(device), torch.rand(tokens, kind.top_k).to(device)
        self.weight_TK = torch.rand(tokens, kind.top_k, generator=generator).to(device)
        self.routed, self.cut = routed, cut

    def launch(self, experts: bool = True, ready: bool = False) -> dict[str, Tensor]:
        """What the launch writes, by name; memory is poisoned first."""
        kind, device, wide = self.kind, self.x.device, torch.float32
        fresh = {"device": device}
        width = kind.outputs // 2 if kind.gated else kind.outputs
        norm = lean.Norm(self.squares, EPS) if kind.normed else None
        work = lean.Product(self.x, self.weight, self.bias, norm=norm, gated=kind.gated, cut=self.cut)
        found: dict[str, Tensor] = {}
        if experts:
            own = self.beside(found, ready)
            work = lean.Product(**{**work.__dict__, "beside": own})
        if kind.residual:
            found["sum"] = self.sum.clone()
            tiles = -(-kind.outputs // work.fitted().rows)
            found["next"] = torch.full((self.tokens, width), math.nan, dtype=self.dtype, **fresh)
            found["squares"] = torch.full((self.tokens, tiles), math.nan, dtype=wide, **fresh)
            residual = lean.Residual(found["sum"], self.norm_weight, found["next"], found["squares"])
            lean.product(lean.Product(**{**work.__dict__, "residual": residual}))
            found["squares"] = found["squares"].sum(1)
        else:
            found["y"] = torch.full((self.tokens, width), math.nan, dtype=self.dtype, **fresh)
            lean.product(lean.Product(**{**work.__dict__, "y_TO": found["y"]}))
        found.pop("h", None)
        return found

    def beside(self, found: dict[str, Tensor], ready: bool) -> beside.Beside:
        kind, device, groups = self.kind, self.x.device, len(self.kind.members)
        rows = self.A.flatten(0, 2)
        if self.routed:
            rows = torch.cat([rows, self.router.flatten(0, 1)])
        shape = beside.scratch(self.tokens, len(rows), groups, kind.rank, kind.top_k, not self.routed)
        h = torch.full(shape, beside.DOWN, dtype=torch.int32, device=device).view(torch.float32)
        index, weight, logits = self.index, self.weight_TK, None
        if self.routed:
            chosen = self.tokens, groups, kind.top_k
            index = found["index"] = torch.full(chosen, -1, dtype=torch.int64, device=device)
            weight = found["weight"] = torch.full(chosen, math.nan, device=device)
            logits = h[:, groups * EXPERTS * kind.rank :]
        flags = torch.full((2,), beside.DOWN, dtype=torch.int32, device=device)
        sizes = kind.members, EXPERTS, kind.rank, kind.top_k, SCALING
        return beside.Beside(
            rows, self.B, *sizes, index, weight, h, flags, 0, logits, gelu=kind.serial, ready=ready
        )

    def meaning(self, experts: bool = True, mutate: str = "") -> dict[str, Tensor]:
        """The same in fp32, from the equations; `mutate` names what is left out or wrong."""
        kind, x = self.kind, self.x.float()
        found: dict[str, Tensor] = {}
        scale = torch.ones(self.tokens, 1, device=x.device)
        if kind.normed and mutate != "norm":
            scale = (self.squares.sum(1, keepdim=True) / kind.inputs + EPS).rsqrt()
        y = x if kind.serial else x @ self.weight.float().T * scale
        if self.bias is not None and mutate != "bias":
            y = y + self.bias.float()
        if experts:
            y = y + self.experts(x * scale, found, mutate)
        if kind.gated:
            gate, up = y.chunk(2, dim=1)
            y = (up * F.silu(gate)) if mutate != "gated" else gate * F.silu(up)
        if kind.residual:
            found["sum"] = self.sum + (y if mutate != "sign" else -y)
            found["next"] = found["sum"] * (self.norm_weight.float() if mutate != "next" else 1.0)
            found["squares"] = found["sum"].square().sum(1)
        else:
            found["y"] = y if mutate != "sign" else -y
        return found

    def experts(self, x: Tensor, found: dict[str, Tensor], mutate: str) -> Tensor:
        kind, start = self.kind, 0
        y = torch.zeros(self.tokens, kind.outputs, device=x.device)
        index = self.index[:, None].expand(-1, len(kind.members), -1)
        weight = self.weight_TK[:, None].expand(-1, len(kind.members), -1)
        if self.routed:
            best = torch.einsum("ti,gei->tge", x, self.router.float()).topk(kind.top_k, dim=-1)
            index, weight = best.indices, torch.softmax(best.values, dim=-1)
            found["index"], found["weight"] = index, weight
        if mutate == "expert":
            index = (index + 1) % EXPERTS
        if mutate == "gate":
            weight = torch.ones_like(weight)
        for g, (column, width) in enumerate(kind.members):
            other = (g + 1) % len(kind.members) if mutate == "member" else g
            low = torch.einsum("ti,tkri->tkr", x, self.A[other].float()[index[:, g]])
            low = F.gelu(low) if kind.serial else low
            up = self.B[:, start : start + width].float()[index[:, g]]
            y[:, column : column + width] = torch.einsum("tkr,tkor,tk->to", low, up, weight[:, g]) * SCALING
            start += width
        return y

    def agrees(self, got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
        """Whether all results are the same sums, in units of the largest: rounded a few times on their way, to the
        operands' type even where the result is in fp32 (gated h, before a tensor core).
        """
        assert got.keys() == want.keys(), (got.keys(), want.keys())
        units = 64 if self.dtype == torch.float32 else 4
        return all(_near(got[name], want[name], units * torch.finfo(self.dtype).eps) for name in want)


def _near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    if not got.is_floating_point():
        return torch.equal(got, want)
    return bool((got.float() - want.float()).abs().max() <= tolerance * want.abs().max())
