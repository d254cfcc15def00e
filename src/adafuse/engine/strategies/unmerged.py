"""What the strategies that leave the weights alone have in common: loop.py, dense.py, gather.py build on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from adafuse.adapters.router import Gates

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter
    from adafuse.adapters.experts import Experts
    from adafuse.adapters.layers import AdaptedLinear


class Unmerged:
    """Base product plus the experts' sum; nothing to decide, nothing to restore."""

    merging = False
    ahead = False

    def prepare(self, adapter: Adapter) -> None:
        pass

    def decide(self, gates: Gates) -> None:
        pass

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        return site.base(x_TI) + self.mix(site.lora, site.drop(x_TI), gates)

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: object) -> Tensor:
        raise NotImplementedError

    def restore(self) -> None:
        pass
