"""The three kinds of expert, as stacked parameters, each in two forms.

`one(e, rows)` is expert e on some rows; `slots(ops, x, gates)` is the weighted sum over the slots that `ops` selects:
all experts (strategies/dense.py) or the chosen ones (strategies/gather.py). In: hidden states [T, I] and gates.
Out: what is added to the backbone's output, [T, O]; for `MlpLoraExperts` the whole output of the MLP.
Next: layers.py, which puts them into the backbone.

Letters: T tokens, S slots, E experts, R rank, I input, O output, M the MLP's inner width.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafuse.adapters.router import Gates


class SlotOps(Protocol):
    """How a strategy selects experts: dense (a slot per expert) or gather (a slot per chosen expert)."""

    def weights(self, gates: Gates) -> Tensor: ...  # [T, S]
    def shrink(self, x_TI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor: ...  # [T, S, R]
    def shrink_each(self, x_TSI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor: ...  # [T, S, R]
    def expand_each(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor: ...  # [T, S, O]
    def expand_sum(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor: ...  # [T, O]


class LoraExperts(nn.Module):
    """`s * B_e (A_e x)` with `s = alpha / r`; A Kaiming-uniform, B zero, as in MoLA and PEFT."""

    def __init__(self, width_in: int, width_out: int, count: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(count, rank, width_in))
        self.lora_B = nn.Parameter(torch.zeros(count, width_out, rank))
        self.alpha = alpha
        for factor in self.lora_A:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    @property
    def count(self) -> int:
        return self.lora_A.shape[0]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[1]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def one(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(F.linear(rows, self.lora_A[e]), self.lora_B[e]) * self.scaling

    def slots(self, ops: SlotOps, x_TI: Tensor, gates: Gates) -> Tensor:
        weight_TS = (ops.weights(gates) * self.scaling).to(x_TI.dtype)
        h_TSR = ops.shrink(x_TI, self.lora_A, gates) * weight_TS[..., None]
        return ops.expand_sum(h_TSR, self.lora_B, gates)


class BottleneckExperts(nn.Module):
    """PESC's serial adapters on the MLP's output u: `gelu(u D_e) U_e`, without bias (arXiv 2401.02731, eq. 4-6)."""

    def __init__(self, width: int, dim: int, count: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(count, dim, width))
        self.up = nn.Parameter(torch.zeros(count, width, dim))
        for factor in self.down:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    @property
    def count(self) -> int:
        return self.down.shape[0]

    def one(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(rows, self.down[e])), self.up[e])

    def slots(self, ops: SlotOps, x_TI: Tensor, gates: Gates) -> Tensor:
        h_TSR = F.gelu(ops.shrink(x_TI, self.down, gates))
        weight_TS = ops.weights(gates).to(x_TI.dtype)
        return ops.expand_sum(h_TSR * weight_TS[..., None], self.up, gates)


class MlpLoraExperts(nn.Module):
    """MixLoRA's experts: the shared frozen MLP, each with its own LoRA on gate, up and down (arXiv 2404.15159).

    The mixture is summed after the non-linearity, so it is not a mixture of weights and cannot be merged.
    """

    def __init__(self, mlp: nn.Module, count: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate_proj, self.up_proj, self.down_proj = (
            LoraExperts(linear.in_features, linear.out_features, count, rank, alpha)
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )

    @property
    def count(self) -> int:
        return self.gate_proj.count

    def one(self, e: int, rows: Tensor, mlp: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
        """Expert e's MLP on `rows`, given the frozen products `gate` and `up` of these rows."""
        inner = mlp.act_fn(gate + self.gate_proj.one(e, rows)) * (up + self.up_proj.one(e, rows))
        return mlp.down_proj(inner) + self.down_proj.one(e, inner)

    def slots(self, ops: SlotOps, x_TI: Tensor, gates: Gates, mlp: nn.Module) -> Tensor:
        weight_TS = ops.weights(gates).to(x_TI.dtype)[..., None]
        gate_TSM = self._branch(ops, x_TI, gates, self.gate_proj) + mlp.gate_proj(x_TI)[:, None]
        up_TSM = self._branch(ops, x_TI, gates, self.up_proj) + mlp.up_proj(x_TI)[:, None]
        inner_TSM = mlp.act_fn(gate_TSM) * up_TSM
        h_TSR = ops.shrink_each(self.drop(inner_TSM), self.down_proj.lora_A, gates)
        h_TSR = h_TSR * weight_TS * self.down_proj.scaling
        # the frozen down projection is linear: mix first, multiply once
        mixed = mlp.down_proj((inner_TSM * weight_TS).sum(1))
        return mixed + ops.expand_sum(h_TSR, self.down_proj.lora_B, gates)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _branch(self, ops: SlotOps, x_TI: Tensor, gates: Gates, lora: LoraExperts) -> Tensor:
        h_TSR = ops.shrink(self.drop(x_TI), lora.lora_A, gates) * lora.scaling
        return ops.expand_each(h_TSR, lora.lora_B, gates)


Experts = LoraExperts | BottleneckExperts | MlpLoraExperts
