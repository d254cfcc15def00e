"""The strategies that write the experts into the backbone's weights, one selection at a time.

`simple_merge` merges each linear when its input arrives (paper, section on simple merge); `switch` takes the old
selection out of all linears and puts the new one in, in place (eq. 9-10, SGMM); `rebase` writes clean weight plus new
selection. This is the plain PyTorch form, a product per linear; on a GPU kernels/switch.py is to do `_write_all` in
one launch. In: the gates of one token (or of a batch that shares them). Out: changed weights, until `restore`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import Experts, LoraExperts
from adafuse.adapters.router import Gates
from adafuse.engine.strategies.dense import Dense

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter
    from adafuse.adapters.layers import AdaptedLinear


def selection(gates: Gates) -> Gates:
    """The one selection of a batch, [1, K]. Raises ValueError if two rows differ."""
    if gates.index_TK.shape[0] > 1:
        dense_TE = gates.dense()
        if not torch.equal(dense_TE, dense_TE[:1].expand_as(dense_TE)):
            raise ValueError(
                "merged weights hold one selection, and the gates of this batch differ: "
                "use batch=1, or a strategy that does not merge (gather, dense, loop)"
            )
    return Gates(gates.index_TK[:1], gates.weight_TK[:1], gates.probs_TE[:1])


def factors(experts: LoraExperts, chosen: Gates, sign: float) -> tuple[Tensor, Tensor]:
    """`up [O, K*R]` with scaling, sign and gates folded in, and `down [K*R, I]` (eq. 4 and 5)."""
    index_K, weight_K = chosen.index_TK[0], chosen.weight_TK[0]
    down = experts.lora_A[index_K].flatten(0, 1)
    scale_K = (weight_K * (sign * experts.scaling)).to(down.dtype)
    up_KOR = experts.lora_B[index_K] * scale_K[:, None, None]
    return up_KOR.transpose(0, 1).flatten(1), down


def fused_factors(experts: LoraExperts, new: Gates, old: Gates | None) -> tuple[Tensor, Tensor]:
    """New selection and, with a minus sign, the old one, along one inner dimension (eq. 7 and 8)."""
    up, down = factors(experts, new, 1.0)
    if old is None:
        return up, down
    old_up, old_down = factors(experts, old, -1.0)
    return torch.cat([up, old_up], dim=1), torch.cat([down, old_down], dim=0)


class SimpleMerge:
    """Layer by layer, in place: one product per linear and token, old out and new in together."""

    merging = True

    def __init__(self) -> None:
        self._sites: list[AdaptedLinear] = []
        self._clean: list[Tensor] = []
        self._merged: dict[int, Gates] = {}
        self._dense = Dense()

    def prepare(self, adapter: Adapter) -> None:
        """Keep clean copies: adding and subtracting in bf16 does not come back by itself."""
        self._sites = [site for site in adapter.linears() if site.experts is not None]
        self._clean = [site.base.weight.detach().clone() for site in self._sites]

    def decide(self, gates: Gates) -> None:
        pass

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        new = selection(gates)
        up, down = fused_factors(site.experts, new, self._merged.get(id(site)))
        site.base.weight.addmm_(up, down)
        self._merged[id(site)] = new
        return site.base(x_TI)

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        raise ValueError("these experts are not linear in the weight, so they cannot be merged")

    def restore(self) -> None:
        if self._merged:
            for site, clean in zip(self._sites, self._clean, strict=True):
                site.base.weight.copy_(clean)
        self._merged = {}


class Switch(SimpleMerge):
    """All linears when the token's gates are known, in place: old out, new in (the paper's SGMM)."""

    def decide(self, gates: Gates) -> None:
        new = selection(gates)
        self._write_all(new)
        for site in self._sites:
            self._merged[id(site)] = new

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        return site.base(x_TI)

    def _write_all(self, new: Gates) -> None:
        for site in self._sites:
            up, down = fused_factors(site.experts, new, self._merged.get(id(site)))
            site.base.weight.addmm_(up, down)


class Rebase(Switch):
    """All linears when the token's gates are known, from the clean weights: exact after any number of tokens."""

    def _write_all(self, new: Gates) -> None:
        for site, clean in zip(self._sites, self._clean, strict=True):
            up, down = factors(site.experts, new, 1.0)
            torch.addmm(clean, up, down, out=site.base.weight)
