"""The kernels as operators of torch: Triton on a CUDA device, naive.py anywhere else.

Registered with `torch.library`, so that torch.compile sees one opaque node of known shapes and mutations and does not
break the graph. Nobody else needs that node: an eager step and a captured one call the function itself. In and out:
as naive.py says; `columns` is its `members`, flat, because operators take flat lists only. Next: strategies/joined.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adafuse.kernels import naive
from adafuse.kernels.config import Members

Shape = Sequence[int]
P = ParamSpec("P")
Y = TypeVar("Y")


def _operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[P, Y]], Callable[P, Y]]:
    """Registers the function, and calls it through torch only where somebody looks at operators: an operator's way
    through torch's dispatcher takes the host 28 us, the plain call 2.4, and an eager step makes a hundred of them.
    """

    def registering(function: Callable[P, Y]) -> Callable[P, Y]:
        registered = torch.library.custom_op(f"adafuse::{name}", function, mutates_args=mutates)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Y:
            return (registered if _looked_at() else function)(*args, **kwargs)

        return call

    return registering


def _looked_at() -> bool:
    """By torch.compile, by a mode (the counter of operations is one), or by the profiler, which tells parts by name."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.profiler._is_profiler_enabled


def members_of(columns: list[int]) -> Members:
    """(first column, width) pairs."""
    return list(zip(columns[::2], columns[1::2], strict=True))


@_operator("expand_behind_", mutates=["y_and_u"])
def expand_behind_(
    y_and_u: Tensor,
    outputs: int,
    lora_B: Tensor,
    index: Tensor,
    weight: Tensor,
    columns: list[int],
    scaling: float,
) -> None:
    """naive.expand_all_ with u = A x standing behind y in the same rows, [T, O + S] or longer."""
    members = members_of(columns)
    y, u = y_and_u[:, :outputs], y_and_u[:, outputs : outputs + _shrunk(lora_B, members)]
    on(y, "gather").expand_all_(y, u, lora_B, index, weight, members, scaling)


@_operator("expand_routed_behind_", mutates=["product"])
def expand_routed_behind_(
    product: Tensor,
    outputs: int,
    lora_B: Tensor,
    columns: list[int],
    top_k: int,
    raw: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """naive.expand_routed_ with u, and the logits of each member's own router, standing behind y in the same rows: of
    O + S + G * E numbers, or longer.
    """
    members = members_of(columns)
    first_router = outputs + _shrunk(lora_B, members)
    ends = [outputs, first_router, first_router + len(members) * lora_B.shape[0]]
    y, u, logits, _ = product.tensor_split(ends, dim=1)
    return on(y, "gather").expand_routed_(y, u, logits, lora_B, members, top_k, raw, scaling)


@torch.library.register_fake("adafuse::expand_routed_behind_")
def _(
    product: Tensor, outputs: int, lora_B: Tensor, columns: list[int], top_k: int, *_: object
) -> tuple[Tensor, Tensor]:
    shape = product.shape[0], len(columns) // 2, top_k
    return product.new_empty(shape, dtype=torch.int64), product.new_empty(shape, dtype=torch.float32)


@_operator("add_all_", mutates=["y"])
def add_all_(y: Tensor, u: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> None:
    """naive.expand_all_ of serial adapters: gelu before the gate, y [T, O] and u [T, E*R] apart."""
    on(y, "gather").expand_all_(y, u, up, index, weight, [(0, y.shape[1])], 1.0, True)


@_operator("add_chosen_", mutates=["y"])
def add_chosen_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> None:
    """naive.shrink, then naive.expand_ of serial adapters, for at most FEW_TOKENS tokens."""
    kernels = on(y, "gather")
    kernels.expand_(y, kernels.shrink(x, down, index), up, index, weight, [(0, y.shape[1])], 1.0, True)


@_operator("route")
def route(x: Tensor, router: Tensor, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """naive.route."""
    return on(x, "route").route(x, router, top_k, raw)


@torch.library.register_fake("adafuse::route")
def _(x: Tensor, router: Tensor, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    routers = x.shape[0], router.shape[0]
    return (
        x.new_empty((*routers, top_k), dtype=torch.int64),
        x.new_empty((*routers, top_k), dtype=torch.float32),
        x.new_empty((*routers, router.shape[1]), dtype=torch.float32),
    )


@_operator("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """naive.linear, for the few tokens of a small batch."""
    return on(x, "fused").linear(x, weight, bias)


@_operator("fused")
def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor,
    gate: Tensor,
    columns: list[int],
    scaling: float,
    flags: Tensor,
    turn: int,
) -> Tensor:
    """naive.fused. `flags` are the kernels' own: no compiler has to know that they change."""
    ring = {"flags": flags, "turn": turn} if x.is_cuda else {}
    operands = lora_A, lora_B, index, gate, members_of(columns), scaling
    return on(x, "fused").fused(x, weight, bias, *operands, **ring)


@torch.library.register_fake("adafuse::linear")
@torch.library.register_fake("adafuse::fused")
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def on(operand: Tensor, kernels: str) -> ModuleType:
    """Whose functions take this operand: kernels/`kernels`.py on a GPU, imported where it is called, else naive.py."""
    return _compiled(kernels) if operand.is_cuda else naive


@cache
def _compiled(kernels: str) -> ModuleType:
    """Looked up once: eager arms call it at every launch."""
    return import_module(f"adafuse.kernels.{kernels}")


def _shrunk(lora_B: Tensor, members: Members) -> int:
    """How many numbers u = A x of all experts of all members are, G * E * R."""
    return len(members) * lora_B.shape[0] * lora_B.shape[2]


# Operations (two per multiply-accumulate) of each operator, from its argument shapes: torch's counter asks for them.
@register_flop_formula([torch.ops.adafuse.expand_behind_, torch.ops.adafuse.add_all_])
def _(y: Shape, _: Any, up: Shape, index: Shape, *rest: Any, **__: Any) -> int:
    return 2 * y[0] * index[2] * up[1] * up[2]


@register_flop_formula(torch.ops.adafuse.expand_routed_behind_)
def _(product: Shape, _: int, up: Shape, columns: list[int], top_k: int, *rest: Any, **__: Any) -> int:
    return 2 * product[0] * top_k * up[1] * up[2]


@register_flop_formula(torch.ops.adafuse.add_chosen_)
def _(y: Shape, x: Shape, down: Shape, up: Shape, index: Shape, *_: Any, **__: Any) -> int:
    return 2 * index[0] * index[1] * (down[1] * down[2] + up[1] * up[2])


@register_flop_formula(torch.ops.adafuse.route)
def _(x: Shape, router: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * router[0] * router[1] * router[2]


@register_flop_formula(torch.ops.adafuse.linear)
def _(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.adafuse.fused)
def _(x: Shape, weight: Shape, *operands: Any, **__: Any) -> int:
    _, lora_A, lora_B, index, _, columns, *_ = operands
    experts = index[0] * index[1] * (lora_A[1] * lora_A[2] + lora_B[2] * sum(columns[1::2]))
    return 2 * (x[0] * weight[0] * weight[1] + experts)
