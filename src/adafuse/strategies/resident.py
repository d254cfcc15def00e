"""`gather` in runtime lean: what a product needs of the experts beside it, laid out once, for kernels/beside.py.

In: an adapter. Out: `Factors` of each projection that has experts, and of PESC's blocks; prefill and training go
through the linears one by one (forward.py). Whenever the adapter enters they are copied anew into the same memory, so
that a captured step has the experts as they are. Next: engine/lean.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import LoraExperts
from adafuse.adapters.forward import UnmergedDense
from adafuse.adapters.layers import MixtureMlp, SerialMlp
from adafuse.adapters.router import Router
from adafuse.config import LINEARS
from adafuse.kernels.config import Members


@dataclass
class Factors:
    """Letters as in kernels/lean.py: `down` are the linears' A, `up` their B, `members` their columns of y; their own
    routers' rows stand behind all A, rounded like every other row. PESC's (`gelu`) reads another input than its
    experts: there they stand alone, in `apart_EI`.
    """

    members: Members
    down: list[Tensor]
    up: list[Tensor]
    routers: list[Router]
    scaling: float
    top_k: int
    rows_SI: Tensor
    lora_B_EOR: Tensor
    apart_EI: Tensor | None

    @property
    def experts(self) -> int:
        return self.lora_B_EOR.shape[0]

    @property
    def rank(self) -> int:
        return self.lora_B_EOR.shape[2]

    @property
    def gelu(self) -> bool:
        return self.apart_EI is not None

    @property
    def shrunk(self) -> int:
        """Rows that are A."""
        return len(self.members) * self.experts * self.rank

    def fill(self) -> None:
        """From the adapter's parameters as they are now."""
        rows = [factor.detach().flatten(0, 1) for factor in self.down]
        routers = [router.weight.detach().to(self.rows_SI.dtype) for router in self.routers]
        torch.cat(rows if self.gelu else [*rows, *routers], out=self.rows_SI)
        torch.cat([factor.detach() for factor in self.up], dim=1, out=self.lora_B_EOR)
        if self.apart_EI is not None:
            self.apart_EI.copy_(routers[0])


class Resident(UnmergedDense):
    """`of` holds the factors by the paths of a projection's linears, or by PESC's MLP alone. MixLoRA's gate and up
    share the router of their block; what its down is given engine/lean.py says.
    """

    def prepare(self, adapter: Adapter) -> None:
        adapted, top_k = adapter.adapted(), adapter.geometry.top_k
        self.of: dict[tuple[str, ...], Factors] = {}
        for projection in adapter.projections:
            starts = accumulate(projection.widths, initial=0)
            members = {
                path: member
                for path, *member in zip(projection.paths, starts, projection.widths, strict=False)
                if path in adapted
            }
            if members:
                columns = [(first, width) for first, width in members.values()]
                sites = [adapted[path] for path in members]
                routers = [site.router for site in sites if site.router is not None]
                chosen = min(top_k, sites[0].lora.count) if sites[0].gated else 1
                self.of[projection.paths] = _of_loras(columns, [site.lora for site in sites], routers, chosen)
        for path, site in adapter.sites.items():
            if isinstance(site, SerialMlp):
                self.of[(path,)] = _of_serial(site)
            elif isinstance(site, MixtureMlp):
                wide = [site.experts.gate_proj, site.experts.up_proj]
                inner, outer = wide[0].lora_B.shape[1], site.experts.down_proj.lora_B.shape[1]
                names = [f"{path}.{name}" for name in LINEARS[4:]]
                columns = [(0, inner), (inner, inner)]
                self.of[tuple(names[:2])] = _of_loras(columns, wide, [site.router], site.router.top_k)
                self.of[(names[2],)] = _of_loras(
                    [(0, outer)], [site.experts.down_proj], [], site.router.top_k
                )
        super().prepare(adapter)

    def enter(self) -> None:
        for factors in self.of.values():
            factors.fill()


def _of_loras(members: Members, loras: Sequence[LoraExperts], routers: list[Router], top_k: int) -> Factors:
    down, up = [lora.lora_A for lora in loras], [lora.lora_B for lora in loras]
    rows = sum(factor.shape[0] * factor.shape[1] for factor in down) + sum(len(r.weight) for r in routers)
    rows_SI = down[0].new_empty(rows, down[0].shape[2])
    lora_B_EOR = up[0].new_empty(len(up[0]), sum(width for _, width in members), up[0].shape[2])
    return Factors(members, down, up, routers, loras[0].scaling, top_k, rows_SI, lora_B_EOR, None)


def _of_serial(site: SerialMlp) -> Factors:
    down, up, router = site.experts.down, site.experts.up, site.router
    rows_SI, apart_EI = torch.empty_like(down).flatten(0, 1), router.weight.new_empty(router.weight.shape)
    apart_EI, members = apart_EI.to(down.dtype), [(0, up.shape[1])]
    return Factors(
        members, [down], [up], [router], 1.0, router.top_k, rows_SI, torch.empty_like(up), apart_EI
    )
