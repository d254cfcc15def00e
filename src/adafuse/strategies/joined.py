"""What `dense`, `gather` and `fused` have in common while decoding: linears that share an input are one projection.

In: an adapter on a backbone. Out: a `Group` of packed factors per projection that has experts, and joints that run
each projection once for all its members. Prefill and training go through the linears one by one (forward.py).
`Appended` also lets the base product do the shrink: the A of all experts are rows behind the weight's own, so that one
launch gives y and u = A x. Read beside the weights they cost their bytes; a launch of its own costs more (measurements
in kernels/README.md). Letters as in kernels/naive.py. Next: dense.py, gather.py, fused.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.forward import UnmergedDense
from adafuse.adapters.layers import AdaptedLinear
from adafuse.adapters.router import Gates, Router, ungated
from adafuse.kernels.config import ROW_MULTIPLE
from adafuse.model.projections import Joint, Projection, join


@dataclass
class Group:
    """The experts of one projection: `sites` are its linears that have some, `columns` (first, width) of each in y."""

    projection: Projection
    sites: list[AdaptedLinear]
    columns: list[int]
    lora_B_EOR: Tensor
    # layer-wise: the routers of the sites, [G, E, I] in fp32
    router_GEI: Tensor | None

    @property
    def scaling(self) -> float:
        return self.sites[0].lora.scaling

    @property
    def router(self) -> Router:
        """Any of the members' routers: they differ in nothing but their weights."""
        assert self.sites[0].router is not None
        return self.sites[0].router

    @property
    def lora_A_CI(self) -> list[Tensor]:
        """The down factors of each member, [E * R, I]."""
        return [site.lora.lora_A.detach().flatten(0, 1) for site in self.sites]


class Joined(UnmergedDense):
    """Subclasses say how a group is computed, and what of it they lay out once."""

    def prepare(self, adapter: Adapter) -> None:
        """Join the backbone's projections and lay the experts of each side by side; about as many bytes again."""
        self._context, adapted = adapter.context, adapter.adapted()
        self.joints = [
            Joint(projection, self.lay_out(_group(projection, adapted)))
            for projection in adapter.projections
            if not adapted.keys().isdisjoint(projection.paths)
        ]
        super().prepare(adapter)

    @abstractmethod
    def lay_out(self, group: Group) -> Callable[[Tensor], Tensor]:
        """Once per group, in order: what makes y [T, O] of x [T, I] for its whole projection, experts included."""

    def shared_gates(self, group: Group, x_TI: Tensor) -> Gates:
        """The gates that all members share; the first projection of a token decides them."""
        if not group.sites[0].gated:
            return ungated(x_TI.shape[0], x_TI.device)
        decides = next((site.decides for site in group.sites if site.decides is not None), None)
        if decides is not None:
            self._context.decide(decides, x_TI)
        assert self._context.gates is not None, "token gates are decided before any projection runs"
        return self._context.gates

    def own_gates(self, group: Group, index_TGK: Tensor, weight_TGK: Tensor) -> None:
        """Tell whoever watches what the members' own routers chose."""
        if self._context.collect:
            for g, site in enumerate(group.sites):
                assert site.router is not None
                gates = Gates(index_TGK[:, g], weight_TGK[:, g], torch.empty(0))
                self._context.said.append((site.router, gates))


@dataclass
class Extended:
    """The rows of a projection's weight with all A behind them, then the routers of its members if they have their
    own, and a bias for all of them.
    """

    rows_OI: Tensor
    bias_O: Tensor | None
    outputs: int

    def product(self, x_TI: Tensor) -> Tensor:
        """[T, O + G*E*R (+ G*E)]: y, behind it u = A x by member, expert and rank, then the routers' logits; zeros fill
        up to the next ROW_MULTIPLE.
        """
        return F.linear(x_TI, self.rows_OI, self.bias_O)


class Appended(Joined):
    """The base product shrinks as well; `enter` puts the factors behind the weights, which all adapters share."""

    def __init__(self) -> None:
        super().__init__()
        self._extended: list[tuple[Group, Extended]] = []

    def extend(self, group: Group) -> Extended:
        """The group's part behind the weight of its projection; `enter` fills it."""
        rows_OI = group.projection.rows_behind(spare_rows(group.projection, group.sites))
        bias_O, outputs = group.projection.bias_O, sum(group.projection.widths)
        if bias_O is not None:
            bias_O = torch.cat([bias_O, bias_O.new_zeros(len(rows_OI) - outputs)])
        extended = Extended(rows_OI, bias_O, outputs)
        self._extended.append((group, extended))
        return extended

    def enter(self) -> None:
        for group, extended in self._extended:
            behind = [*group.lora_A_CI]
            if group.router_GEI is not None:
                # rounded like every other row; the reference bounds by how much a choice may miss for it
                behind.append(group.router_GEI.flatten(0, 1).to(extended.rows_OI.dtype))
            spare_CI = extended.rows_OI[extended.outputs :]
            # other adapters write behind the same weights
            behind.append(spare_CI.new_zeros(len(spare_CI) - sum(map(len, behind)), spare_CI.shape[1]))
            torch.cat(behind, out=spare_CI)


def make_room(adapter: Adapter) -> None:
    """Move the backbone's weights, if they have to move for this adapter, before anything keeps their addresses."""
    for projection in join(adapter.model):
        sites = [adapter.sites[path] for path in projection.paths if path in adapter.sites]
        projection.rows_behind(spare_rows(projection, [site for site in sites if site.experts is not None]))


def spare_rows(projection: Projection, sites: Sequence[AdaptedLinear]) -> int:
    """Rows of all experts, and of the routers, of the adapted linears of one projection, and of zeros behind them so
    that all rows are a ROW_MULTIPLE; none without experts.
    """
    used = sum(site.lora.count * (site.lora.rank + (site.router is not None)) for site in sites)
    return used + -(sum(projection.widths) + used) % ROW_MULTIPLE if used else 0


def _group(projection: Projection, adapted: dict[str, AdaptedLinear]) -> Group:
    starts = [sum(projection.widths[:i]) for i in range(len(projection.paths))]
    members = [
        (adapted[path], start, width)
        for path, start, width in zip(projection.paths, starts, projection.widths, strict=True)
        if path in adapted
    ]
    sites = [site for site, _, _ in members]
    routers = [site.router.weight.detach() for site in sites if site.router is not None]
    return Group(
        projection,
        sites,
        [number for _, start, width in members for number in (start, width)],
        torch.cat([site.lora.lora_B.detach() for site in sites], dim=1),
        torch.stack(routers) if routers else None,
    )
