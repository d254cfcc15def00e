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


def signed(new: Gates, old: Gates | None) -> tuple[Tensor, Tensor]:
    """Experts [S] and their gates [S] of a switch: the new selection, and with a minus sign the old one (eq. 7)."""
    if old is None:
        return new.index_TK[0], new.weight_TK[0]
    return torch.cat([new.index_TK[0], old.index_TK[0]]), torch.cat([new.weight_TK[0], -old.weight_TK[0]])


def packed_up(experts: LoraExperts) -> Tensor:
    """Up factors with their scaling as [E, R, O]: selected rows are then contiguous, without a copy per token."""
    return (experts.lora_B.detach() * experts.scaling).transpose(1, 2).contiguous()


def factors(up_ERO: Tensor, down_ERI: Tensor, index_S: Tensor, gate_S: Tensor) -> tuple[Tensor, Tensor]:
    """`up [O, S*R]` and `down [S*R, I]`, the gates folded into the latter (eq. 4, 5, 7, 8)."""
    down_SRI = down_ERI[index_S] * gate_S.to(down_ERI.dtype)[:, None, None]
    return up_ERO[index_S].flatten(0, 1).T, down_SRI.flatten(0, 1)


class SimpleMerge:
    """Layer by layer, in place: one product per linear and token, old out and new in together."""

    merging = True
    # all linears are written before the first of them runs, so the plain backbone does the rest
    ahead = False

    def __init__(self) -> None:
        self._sites: list[AdaptedLinear] = []
        self._up: dict[int, Tensor] = {}
        self._clean: dict[int, Tensor] = {}
        self._merged: dict[int, Gates] = {}

    def prepare(self, adapter: Adapter) -> None:
        """Keep clean copies: adding and subtracting in bf16 does not come back by itself."""
        self._sites = [site for site in adapter.linears() if site.experts is not None]
        self._up = {id(site): packed_up(site.lora) for site in self._sites}
        self._clean = {id(site): site.base.weight.detach().clone() for site in self._sites}

    def decide(self, gates: Gates) -> None:
        pass

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        new = selection(gates)
        index_S, gate_S = signed(new, self._merged.get(id(site)))
        self._add(site, index_S, gate_S)
        self._merged[id(site)] = new
        return site.base(x_TI)

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        raise ValueError("these experts are not linear in the weight, so they cannot be merged")

    def restore(self) -> None:
        if self._merged:
            for site in self._sites:
                site.base.weight.copy_(self._clean[id(site)])
        self._merged = {}

    def _add(self, site: AdaptedLinear, index_S: Tensor, gate_S: Tensor) -> None:
        """W += up @ down, in place (eq. 9)."""
        site.base.weight.addmm_(*factors(self._up[id(site)], site.lora.lora_A, index_S, gate_S))


class Switch(SimpleMerge):
    """All linears when the token's gates are known, in place: old out, new in (the paper's SGMM, eq. 10)."""

    ahead = True

    def decide(self, gates: Gates) -> None:
        new = selection(gates)
        self._write_all(new)
        self._merged = dict.fromkeys(map(id, self._sites), new)

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        return site.base(x_TI)

    def _write_all(self, new: Gates) -> None:
        index_S, gate_S = signed(new, next(iter(self._merged.values()), None))
        for site in self._sites:
            self._add(site, index_S, gate_S)


class Rebase(Switch):
    """All linears when the token's gates are known, from the clean weights: exact after any number of tokens."""

    def _write_all(self, new: Gates) -> None:
        index_S, gate_S = signed(new, None)
        for site in self._sites:
            up, down = factors(self._up[id(site)], site.lora.lora_A, index_S, gate_S)
            torch.addmm(self._clean[id(site)], up, down, out=site.base.weight)
