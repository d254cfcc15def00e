"""What the strategies that leave the weights alone have in common: loop.py and joined.py build on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from adafuse.adapters.router import Gates

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter
    from adafuse.adapters.experts import Experts
    from adafuse.adapters.layers import AdaptedLinear
    from adafuse.model.projections import Joint


class Unmerged:
    """Base product plus the experts' sum; nothing to decide, nothing to restore."""

    merging = False
    ahead = False
    # a router is one launch (kernels/route.py), as everything else here; the published loops call torch step by step
    routes_at_once = True
    joints: Sequence[Joint] = ()

    def prepare(self, adapter: Adapter) -> None:
        pass

    def enter(self) -> None:
        pass

    def decide(self, gates: Gates) -> None:
        pass

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        return site.base(x_TI) + self.mix(site.lora, site.drop(x_TI), gates)

    def add(self, y: Tensor, experts: Experts, x_TI: Tensor, gates: Gates) -> Tensor:
        """y plus the experts' sum, in y's shape; may write into y."""
        return y + self.mix(experts, x_TI, gates).view_as(y)

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        raise NotImplementedError

    def restore(self) -> None:
        pass
