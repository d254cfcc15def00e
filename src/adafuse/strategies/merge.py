"""The strategies that write the experts into the backbone's weights, one selection at a time.

`simple_merge` merges each linear when its input arrives (paper, section on simple merge), and makes gates that several
share ready once; `switch` takes the old selection out of all linears and puts the new one in, in place (eq. 9-10,
SGMM); `rebase` writes clean weight plus new selection. The last two are one launch on a GPU (kernels/switch.py)
and a product per linear elsewhere; a token that is left to the backbone (gates of zero) costs them one restore, and
nothing if the token before was left to it too. In: the gates of one token (or of a batch that shares them). Out:
changed weights, until `restore`.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import Experts, LoraExperts
from adafuse.adapters.forward import Strategy
from adafuse.adapters.layers import AdaptedLinear
from adafuse.adapters.router import Gates
from adafuse.model.clean import clean_copy

if TYPE_CHECKING:
    from adafuse.kernels.switch import SwitchPlan


class Selection:
    """What a weight holds now and what it held before, on the device: [2K] experts and their signed gates.

    The new K come first. The addresses stay, so that a captured graph goes on from token to token. Gates of zero, as at
    first and after `clear`, say that the weight is clean: whoever clears puts the clean weight back.
    """

    def __init__(self, top_k: int, device: torch.device) -> None:
        self.top_k = top_k
        self.index_S = torch.zeros(2 * top_k, dtype=torch.int64, device=device)
        self.gate_S = torch.zeros(2 * top_k, dtype=torch.float32, device=device)

    def shift(self, new: Gates) -> None:
        """The old selection is now the second half, with a minus sign (eq. 7); a gate of zero is no expert."""
        k, (index_K, gate_K) = self.top_k, _one(new)
        self.index_S[k:].copy_(self.index_S[:k])
        torch.neg(self.gate_S[:k], out=self.gate_S[k:])
        self.index_S[:k].copy_(index_K)
        self.gate_S[:k].copy_(gate_K)

    def clear(self) -> None:
        self.gate_S.zero_()


def _one(gates: Gates) -> tuple[Tensor, Tensor]:
    """The one selection of a batch, [K] and [K]. Raises ValueError if two rows differ."""
    if gates.index_TK.shape[0] > 1:
        dense_TE = gates.dense()
        if not torch.equal(dense_TE, dense_TE[:1].expand_as(dense_TE)):
            raise ValueError(
                "merged weights hold one selection, and the gates of this batch differ: "
                "use batch=1, or a strategy that does not merge (gather, dense, loop)"
            )
    return gates.index_TK[0], gates.weight_TK[0]


def packed_up(experts: LoraExperts) -> Tensor:
    """Up factors with their scaling as [E, R, O]: selected rows are then contiguous, without a copy per token."""
    return (experts.lora_B.detach() * experts.scaling).transpose(1, 2).contiguous()


def factors(up_ERO: Tensor, down_ERI: Tensor, index_S: Tensor, gate_S: Tensor) -> tuple[Tensor, Tensor]:
    """`up [O, S*R]` and `down [S*R, I]`, the gates folded into the latter (eq. 4, 5, 7, 8)."""
    down_SRI = down_ERI[index_S] * gate_S.to(down_ERI.dtype)[:, None, None]
    return up_ERO[index_S].flatten(0, 1).T, down_SRI.flatten(0, 1)


class SimpleMerge(Strategy):
    """Layer by layer, in place: one product per linear and token, old out and new in together."""

    merging = True
    # every token's weights are written from the clean ones
    from_clean = False

    def __init__(self) -> None:
        self._sites: list[AdaptedLinear] = []
        self._clean: dict[AdaptedLinear, Tensor] = {}

    def prepare(self, adapter: Adapter) -> None:
        """Keep clean copies: adding and subtracting in bf16 does not come back by itself."""
        self._sites = list(adapter.adapted().values())
        self._clean = {site: clean_copy(site.base.weight, self.from_clean) for site in self._sites}
        self._prepare(adapter)
        self.prepared = True

    def _prepare(self, adapter: Adapter) -> None:
        self._up = {site: packed_up(site.lora) for site in self._sites}
        # linears that share a decision share its selection: the first of them to run makes it ready for all
        first: dict[nn.Module, AdaptedLinear] = {}
        self._first = {site: first.setdefault(site.decided_by or site, site) for site in self._sites}
        self._selections = {site: _selection(adapter, site) for site in first.values()}
        self._chosen: dict[AdaptedLinear, tuple[Tensor, Tensor]] = {}

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        first, down_ERI = self._first[site], site.lora.lora_A
        if site is first:
            selection = self._selections[site]
            selection.shift(gates)
            # rounded once, where `factors` would at every linear
            self._chosen[site] = selection.index_S, selection.gate_S.to(down_ERI.dtype)
        # W += up @ down, in place (eq. 9)
        site.base.weight.addmm_(*factors(self._up[site], down_ERI, *self._chosen[first]))
        return site.base(x_TI)

    def add(self, y: Tensor, experts: Experts, x_TI: Tensor, gates: Gates) -> NoReturn:
        self.mix(experts, x_TI, gates)

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> NoReturn:
        raise ValueError("these experts are not linear in the weight, so they cannot be merged")

    def restore(self) -> None:
        """Clean weights, and no selection to take out of them; a graph's replays merge unseen, so always."""
        self._copy_clean()
        self._clear()

    def _copy_clean(self) -> None:
        for site in self._sites:
            site.base.weight.copy_(self._clean[site])

    def _clear(self) -> None:
        for selection in self._selections.values():
            selection.clear()


class Switch(SimpleMerge):
    """All linears when the token's gates are known, in place: old out, new in (the paper's SGMM, eq. 10)."""

    ahead = True

    def _prepare(self, adapter: Adapter) -> None:
        self._selection = _selection(adapter, self._sites[0])
        self._plan = self._planned() if self._sites[0].base.weight.is_cuda else None
        if self._plan is None:
            self._up = {site: packed_up(site.lora) for site in self._sites}

    def _planned(self) -> SwitchPlan:
        """Of the weights of all sites, the clean ones if needed, and their factors (kernels/switch.py)."""
        weights = [site.base.weight.detach() for site in self._sites]
        clean = [*self._clean.values()] if self.from_clean else None
        lora_A = [site.lora.lora_A.detach() for site in self._sites]
        lora_B = [site.lora.lora_B.detach() for site in self._sites]
        return _kernel().plan(weights, clean, lora_A, lora_B)

    def decide(self, gates: Gates) -> None:
        self._selection.shift(gates)
        self._write()

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        return site.base(x_TI)

    def _write(self) -> None:
        index_S, gate_S = self._selection.index_S, self._selection.gate_S
        if self._plan is not None:
            _kernel().switch_(self._plan, index_S, gate_S * self._sites[0].lora.scaling)
        elif gate_S.any():
            for site in self._sites:
                site.base.weight.addmm_(*self._factors(site, index_S, gate_S))

    def _factors(self, site: AdaptedLinear, index_S: Tensor, gate_S: Tensor) -> tuple[Tensor, Tensor]:
        """Without those of a slot whose gate is zero, which must not count whatever they hold; off a GPU alone."""
        used_S = gate_S != 0
        return factors(self._up[site], site.lora.lora_A, index_S[used_S], gate_S[used_S])

    def _clear(self) -> None:
        self._selection.clear()


class Rebase(Switch):
    """All linears when the token's gates are known, from the clean weights: exact after any number of tokens."""

    from_clean = True

    def _write(self) -> None:
        top_k, index_S, gate_S = self._selection.top_k, self._selection.index_S, self._selection.gate_S
        if self._plan is not None:
            new_K, old_K = (gate_S * self._sites[0].lora.scaling).split(top_k)
            _kernel().rebase_(self._plan, index_S[:top_k], new_K, old_K)
        elif gate_S[:top_k].any():
            for site in self._sites:
                up, down = self._factors(site, index_S[:top_k], gate_S[:top_k])
                torch.addmm(self._clean[site], up, down, out=site.base.weight)
        elif gate_S.any():
            self._copy_clean()


def _selection(adapter: Adapter, site: AdaptedLinear) -> Selection:
    top_k = min(adapter.geometry.top_k, site.lora.count) if site.gated else 1
    return Selection(top_k, site.base.weight.device)


def _kernel() -> ModuleType:
    """Imported where it is launched: there is no Triton without Linux, and the products need none."""
    from adafuse.kernels import switch

    return switch
