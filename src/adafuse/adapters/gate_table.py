"""Which experts a timed arm uses, from a table instead of from its router: evenly, skewed, never or always others.

In: a seed, the geometry, a batch. Out: a `GateTable` on the device, read row by row as tokens are decoded, inside a
captured graph too. What a batch costs depends on how many experts it touches, and random weights route as they please;
with a table a cell can say what it times. The router runs all the same, and the gates are its probabilities of the
experts that the table names, or zero for a token that the table leaves to the backbone alone. Next: layers.py, whose
`Context` asks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adafuse.adapters.router import Gates
from adafuse.config import Experts, GateSource

# rows of a table; longer decodes begin again
STEPS = 512
# steps over which bypassed tokens are spread: a timed block reads a stretch of the table, and has their share too
SPREAD = 16


class GateTable:
    """Expert numbers [N, B, K] by step and sequence, and the step that comes next, which lives on the device.

    `used_NB` is false where a token is left to the backbone; None where no token is.
    """

    def __init__(self, index_NBK: Tensor, used_NB: Tensor | None = None) -> None:
        self.index_NBK, self.used_NB = index_NBK, used_NB
        self.step = torch.zeros(1, dtype=torch.int64, device=index_NBK.device)
        # where `step` should be by what the host has launched
        self.launched = 0

    def restart(self) -> None:
        """The next token takes the first row."""
        self.step.zero_()
        self.launched = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Every token that is launched inside, each added to `launched`, must have taken one row. Reads the device."""
        self.launched = int(self.step)
        yield
        counted = int(self.step)
        assert counted == self.launched, f"took gates up to {counted}, launched up to {self.launched}"

    def replace(self, gates: Gates, raw: bool) -> Gates:
        """The router's word [T, K] with the table's experts; `raw` gates do not sum to one. Nothing is read back."""
        tokens = gates.index_TK.shape[0]
        row = self.step % len(self.index_NBK)
        index_TK = self.index_NBK.index_select(0, row)[0, :tokens]
        weight_TK = gates.probs_TE.gather(-1, index_TK)
        if not raw:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        if self.used_NB is not None:
            # a product is one launch, and times false it is zero
            weight_TK = weight_TK * self.used_NB.index_select(0, row)[0, :tokens, None]
        self.step.add_(1)
        return Gates(index_TK, weight_TK, gates.probs_TE, gates.used_T)


def make(
    source: GateSource, experts: Experts, batch: int, seed: int, where: str, bypass_share: float = 0.0
) -> GateTable | None:
    """The table of `source`; None where the router decides. With a share the same experts, but for fewer tokens."""
    if source is GateSource.router:
        return None
    generator = torch.Generator().manual_seed(seed)
    index_NBK = _rows(source, experts.count, experts.top_k, batch, generator).to(where)
    used_NB = _used(bypass_share, batch, generator).to(where) if bypass_share else None
    return GateTable(index_NBK, used_NB)


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


def _used(bypass_share: float, batch: int, generator: torch.Generator) -> Tensor:
    """[N, B]: false for exactly that share of the table, rounded to a token, and for as many in each SPREAD steps."""
    stretches, tokens = STEPS // SPREAD, SPREAD * batch
    due = (torch.arange(stretches + 1, dtype=torch.float64) * tokens * bypass_share).round()
    place = torch.rand(stretches, tokens, generator=generator).argsort(-1)
    return (place >= due.diff()[:, None]).view(STEPS, batch)
