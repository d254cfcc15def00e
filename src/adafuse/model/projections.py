"""Linears that share their input as one matrix: q, k, v of a block; o; gate, up; down. Seven products become four.

In: a Llama-family model. Out: its projections, whose joined weight is the linears' own storage laid side by side, and
a way to run each once per token: `placed` puts `Member`s where the linears were; the first of them computes, the
others take their columns. The backbone runs so in every static runtime, the joined strategies add experts to it.
Next: strategies/joined.py, engine/graph.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adafuse.model.llama import blocks_of, linear_path

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass
class Projection:
    """`weight_OI` and `bias_O` hold the rows of all `linears`, which are views of them.

    `places` are the modules that hold the linears, and by which name. Behind the weight's rows there may be room for
    others that multiply the same input (`rows_behind`).
    """

    paths: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]
    linears: tuple[nn.Linear, ...]
    storage_OI: Tensor
    bias_O: Tensor | None

    @property
    def widths(self) -> list[int]:
        return [linear.out_features for linear in self.linears]

    @property
    def weight_OI(self) -> Tensor:
        return self.storage_OI[: sum(self.widths)]

    def rows_behind(self, count: int) -> Tensor:
        """[O + count, I], the weight's rows first. Moves the weight where there is too little room: then whatever keeps
        an address of it (a captured graph, a switch's plan) is stale.
        """
        rows = sum(self.widths)
        if self.storage_OI.shape[0] < rows + count:
            storage = self.storage_OI.new_empty(rows + count, self.storage_OI.shape[1])
            storage[:rows].copy_(self.weight_OI)
            self.storage_OI = storage
            _share(self.linears, "weight", storage[:rows])
        return self.storage_OI[: rows + count]

    def is_joined(self) -> bool:
        """False once a linear got a weight of its own again (a model moved or cast after it was joined)."""
        starts = self.weight_OI.split(self.widths)
        pairs = zip(self.linears, starts, strict=True)
        return all(linear.weight.data_ptr() == start.data_ptr() for linear, start in pairs)


@dataclass
class Joint:
    """A projection and how it is computed, x [T, I] -> y [T, O]; `parts` is y, cut for the members, until they run."""

    projection: Projection
    compute: Callable[[Tensor], Tensor]
    parts: tuple[Tensor, ...] = field(default=())

    def output(self, position: int, x: Tensor) -> Tensor:
        """The columns of member `position`; the first member of a block's forward computes for all."""
        if position == 0:
            y = self.compute(x.reshape(-1, x.shape[-1]))
            self.parts = y.view(*x.shape[:-1], y.shape[-1]).split(self.projection.widths, dim=-1)
        return self.parts[position]


class Member(nn.Module):
    """Stands where a linear was."""

    def __init__(self, joint: Joint, position: int) -> None:
        super().__init__()
        self.joint, self.position = joint, position

    def forward(self, x: Tensor) -> Tensor:
        return self.joint.output(self.position, x)


def join(model: nn.Module) -> list[Projection]:
    """All projections in the order in which they run; the linears' weights become views of the joined ones.

    No byte more is held afterwards. The model must be plain, and nothing may keep an address of a weight yet; a second
    call finds the work done.
    """
    found = _JOINED.get(model, [])
    if not found or not all(projection.is_joined() for projection in found):
        found = [
            _join(model, tuple(linear_path(block, name) for name in names))
            for block in range(len(blocks_of(model)))
            for names in SHARED_INPUT
        ]
        _JOINED[model] = found
    return found


def unjoin(model: nn.Module) -> None:
    """Every linear has storage of its own again, of the same numbers: files and others' tools want no views."""
    for projection in _JOINED.pop(model, []):
        for linear in projection.linears if projection.is_joined() else ():
            for parameter in linear.parameters():
                parameter.data = parameter.data.clone()


@contextmanager
def placed(joints: Iterable[Joint]) -> Iterator[None]:
    """Members in the linears' place; afterwards whatever stood there before stands there again."""
    before = []
    for joint in joints:
        for position, (parent, name) in enumerate(joint.projection.places):
            before.append((parent, name, getattr(parent, name)))
            setattr(parent, name, Member(joint, position))
    try:
        yield
    finally:
        for parent, name, module in before:
            setattr(parent, name, module)


# by model, so that all adapters of a backbone share its projections
_JOINED: WeakKeyDictionary[nn.Module, list[Projection]] = WeakKeyDictionary()


def _join(model: nn.Module, paths: tuple[str, ...]) -> Projection:
    split = [path.rpartition(".") for path in paths]
    places = tuple((model.get_submodule(owner), name) for owner, _, name in split)
    linears = tuple(getattr(parent, name) for parent, name in places)
    weight_OI = torch.cat([linear.weight.detach() for linear in linears])
    _share(linears, "weight", weight_OI)
    bias_O = None
    if linears[0].bias is not None:
        bias_O = torch.cat([linear.bias.detach() for linear in linears])
        _share(linears, "bias", bias_O)
    return Projection(paths, places, linears, weight_OI, bias_O)


def _share(linears: tuple[nn.Linear, ...], name: str, whole: Tensor) -> None:
    for linear, rows in zip(linears, whole.split([linear.out_features for linear in linears]), strict=True):
        getattr(linear, name).data = rows
