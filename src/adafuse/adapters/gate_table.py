"""Which experts a timed arm uses, from a table instead of from its router: evenly, skewed, never or always others.

In: a seed, the geometry, a batch. Out: a `GateTable` on the device, read row by row as tokens are decoded, inside a
captured graph too. What a batch costs depends on how many experts it touches, and random weights route as they please;
with a table a cell can say what it times. The router runs all the same, and the gates are its probabilities of the
experts that the table names. Next: layers.py, whose `Context` asks it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adafuse.adapters.router import Gates
from adafuse.config import Experts, GateSource

# rows of a table; longer decodes begin again
STEPS = 512


class GateTable:
    """Expert numbers [N, B, K] by step and sequence, and the step that comes next, which lives on the device."""

    def __init__(self, index_NBK: Tensor) -> None:
        self.index_NBK = index_NBK
        self.step = torch.zeros(1, dtype=torch.int64, device=index_NBK.device)

    def restart(self) -> None:
        """The next token takes the first row."""
        self.step.zero_()

    def replace(self, gates: Gates, raw: bool) -> Gates:
        """The router's word [T, K] with the table's experts; `raw` gates do not sum to one. Nothing is read back."""
        tokens = gates.index_TK.shape[0]
        row_BK = self.index_NBK.index_select(0, self.step % len(self.index_NBK))[0]
        self.step.add_(1)
        index_TK = row_BK[:tokens]
        weight_TK = gates.probs_TE.gather(-1, index_TK)
        if not raw:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return Gates(index_TK, weight_TK, gates.probs_TE)


def make(source: GateSource, experts: Experts, batch: int, seed: int, where: str) -> GateTable | None:
    """The table of `source`; None where the router decides."""
    if source is GateSource.router:
        return None
    generator = torch.Generator().manual_seed(seed)
    return GateTable(_rows(source, experts.count, experts.top_k, batch, generator).to(where))


def _rows(source: GateSource, count: int, top_k: int, batch: int, generator: torch.Generator) -> Tensor:
    """[N, B, K] distinct experts for each step and sequence."""
    if source is GateSource.same:
        return torch.arange(top_k).expand(STEPS, batch, top_k).contiguous()
    if source is GateSource.distinct:
        # round after round through the experts: none is used twice in a row, and sequences lie as far apart as they can
        first = (torch.arange(STEPS)[:, None] + torch.arange(batch)) * top_k
        return (first[..., None] + torch.arange(top_k)) % count
    weights = torch.ones(count)
    if source is GateSource.zipf:
        weights = 1.0 / torch.arange(1, count + 1)
    draws = torch.multinomial(weights.expand(STEPS * batch, count), top_k, generator=generator)
    return draws.view(STEPS, batch, top_k)
