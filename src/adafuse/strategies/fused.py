"""`fused`: base product, shrink and expand of a whole projection in one launch (kernels/fused.py).

In: hidden states of a few tokens, gates that are known before the projection runs. Out: y [T, O]. Projections without
experts take the same matrix-vector product, so that what the experts add is not hidden in a better base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import Tensor

from adafuse.adapters.adapter import Adapter
from adafuse.kernels import ops
from adafuse.model.projections import Joint, Projection
from adafuse.strategies.joined import Group, Joined


class Fused(Joined):
    """One flag per group, by which the programs of a launch wait for each other; groups take turns (a ring)."""

    def prepare(self, adapter: Adapter) -> None:
        self._turns = count()
        self._flags = torch.zeros(len(adapter.projections), dtype=torch.int32, device=adapter.device)
        super().prepare(adapter)
        # around the ring of the groups that there are
        self._flags = self._flags[: len(self.joints)]
        adapted = {joint.projection.paths for joint in self.joints}
        plain = [p for p in adapter.projections if p.paths not in adapted]
        self.joints = [*self.joints, *(Joint(p, partial(product, p)) for p in plain)]

    def enter(self) -> None:
        self._flags.zero_()

    def lay_out(self, group: Group) -> Callable[[Tensor], Tensor]:
        """The members' A [E, G*R, I] in one tensor, and the group's turn."""
        lora_A_ECI = torch.cat([site.lora.lora_A.detach() for site in group.sites], dim=1)
        return partial(self._compute, group, lora_A_ECI, next(self._turns))

    def _compute(self, group: Group, lora_A_ECI: Tensor, turn: int, x_TI: Tensor) -> Tensor:
        gates, base = self.shared_gates(group, x_TI), group.projection
        experts = lora_A_ECI, group.lora_B_EOR, gates.index_TK, gates.weight_TK, group.columns, group.scaling
        return ops.fused(x_TI, base.weight_OI, base.bias_O, *experts, self._flags, turn)


def product(projection: Projection, x_TI: Tensor) -> Tensor:
    """The plain projection by our own kernel."""
    return ops.linear(x_TI, projection.weight_OI, projection.bias_O)
