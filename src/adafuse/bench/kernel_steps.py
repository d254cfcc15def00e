"""The steps of a pass: one call of a kernel on one projection of one block, and the same by naive.py.

In: a `Case`, seeded operands (kernel_operands.py), the names of a projection's linears. Out: a `Step`. The kernels are
called as they are, without the operators of ops.py, so that a CPU runs them too (in Triton's interpreter). Letters as
in kernels/naive.py. Next: kernel_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adafuse.bench.cost import experts_read
from adafuse.bench.kernel_operands import SCALING, Adapted, Case, Draw, Linear, Step, fp32_copy
from adafuse.config import StrategyName
from adafuse.kernels import fused, gather, gather_routed, gemv, naive, route


def _shrink_expand(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The chosen experts alone, for a few tokens, in two launches."""
    o = Adapted(draw, case, names)
    lora_A_ECI, y_TO = o.lora_A_ECI(draw), draw.normal(len(o.x_TI), o.outputs)

    def apply(kernels: Any, y_TO: Tensor) -> list[Tensor]:
        h_PTKC = kernels.shrink(o.x_TI, lora_A_ECI, o.index_TK)
        kernels.expand_(y_TO, h_PTKC, o.lora_B_EOR, o.index_TK, o.weight_TK, o.members, SCALING)
        return [y_TO]

    moved = _chosen_bytes(draw, case, lora_A_ECI, o.lora_B_EOR)
    return Step(lambda: apply(gather, y_TO), lambda: apply(naive, fp32_copy(y_TO)), moved)


def _expand_all(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The chosen experts' B, in one launch; u = A x stands behind y."""
    o = Adapted(draw, case, names)
    y_TO, u_TS = draw.normal(len(o.x_TI), o.outputs + o.shrunk).tensor_split([o.outputs], dim=1)
    chosen = o.index_TK[:, None], o.weight_TK[:, None]

    def apply(kernels: Any, y_TO: Tensor) -> list[Tensor]:
        kernels.expand_all_(y_TO, u_TS, o.lora_B_EOR, *chosen, o.members, SCALING)
        return [y_TO]

    moved = _chosen_bytes(draw, case, o.lora_B_EOR)
    return Step(lambda: apply(gather, y_TO), lambda: apply(naive, fp32_copy(y_TO)), moved)


def _gather(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The whole projection: the library's product with all A behind the weight, then `expand_all`."""
    o = Adapted(draw, case, names)
    rows_OI = o.rows(draw, spare=o.shrunk)
    chosen = o.index_TK[:, None], o.weight_TK[:, None]

    def apply(kernels: Any, y_and_u: Tensor) -> list[Tensor]:
        y_TO, u_TS = y_and_u.tensor_split([o.outputs], dim=1)
        kernels.expand_all_(y_TO, u_TS, o.lora_B_EOR, *chosen, o.members, SCALING)
        return [y_TO]

    return Step(
        lambda: apply(gather, F.linear(o.x_TI, rows_OI)),
        lambda: apply(naive, naive.linear(o.x_TI.float(), rows_OI, None)),
        rows_OI.nbytes + _chosen_bytes(draw, case, o.lora_B_EOR),
    )


def _gather_routed(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The same with a router for each member, whose rows stand behind A: `expand_routed` chooses for itself."""
    o, experts = Adapted(draw, case, names), draw.sizes.experts
    rows_OI = o.rows(draw, spare=o.shrunk + len(names) * experts)
    # every token ranks the experts in an order of its own, by steps of 4 with little beside: no tie that rounding could
    # turn over
    order_TE = torch.rand(len(o.x_TI), experts, generator=draw.generator, device=draw.where).argsort(-1)
    o.x_TI[:, :experts] = 4.0 * order_TE
    routers_CI = rows_OI[o.outputs + o.shrunk :].mul_(0.05)
    routers_CI[:, :experts] = torch.eye(experts, device=draw.where).repeat(len(names), 1)

    def apply(kernels: Any, product: Tensor) -> list[Tensor]:
        y_TO, u_TS, logits_TS = product.tensor_split([o.outputs, o.outputs + o.shrunk], dim=1)
        knobs = o.members, draw.sizes.top_k, False, SCALING
        return [y_TO, *kernels.expand_routed_(y_TO, u_TS, logits_TS, o.lora_B_EOR, *knobs)]

    return Step(
        lambda: apply(gather_routed, F.linear(o.x_TI, rows_OI)),
        lambda: apply(naive, naive.linear(o.x_TI.float(), rows_OI, None)),
        rows_OI.nbytes + _chosen_bytes(draw, case, o.lora_B_EOR),
    )


def _dense(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The whole projection in library products, as strategies/dense.py: all experts, and a mask of gates."""
    o, experts = Adapted(draw, case, names), draw.sizes.experts
    rows_OI = o.rows(draw, spare=o.shrunk)
    parts = o.lora_B_EOR.split([width for _, width in o.members], dim=1)
    ups = [(part * SCALING).transpose(1, 2).flatten(0, 1) for part in parts]
    gates_TE = torch.zeros(len(o.x_TI), experts, device=draw.where).scatter(-1, o.index_TK, o.weight_TK)

    def launch() -> list[Tensor]:
        y_TO, u_TS = F.linear(o.x_TI, rows_OI).tensor_split([o.outputs], dim=1)
        u_TGER = u_TS.unflatten(1, (len(names), experts, -1))
        h_TGS = (u_TGER * gates_TE[:, None, :, None].to(u_TS.dtype)).flatten(2)
        for g, (up_SO, (column, width)) in enumerate(zip(ups, o.members, strict=True)):
            y_TO[:, column : column + width].addmm_(h_TGS[:, g], up_SO)
        return [y_TO]

    def wanted() -> list[Tensor]:
        y_TO, u_TS = naive.linear(o.x_TI.float(), rows_OI, None).tensor_split([o.outputs], dim=1)
        chosen = o.index_TK[:, None], o.weight_TK[:, None]
        naive.expand_all_(y_TO, u_TS, o.lora_B_EOR, *chosen, o.members, SCALING)
        return [y_TO]

    return Step(launch, wanted, rows_OI.nbytes + o.lora_B_EOR.nbytes)


def _fused(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The whole projection in one launch."""
    o = Adapted(draw, case, names)
    rows_OI, lora_A_ECI = o.rows(draw), o.lora_A_ECI(draw)
    turn = next(draw.turns)
    rest = rows_OI, None, lora_A_ECI, o.lora_B_EOR, o.index_TK, o.weight_TK, o.members, SCALING

    def launch() -> list[Tensor]:
        return [fused.fused(o.x_TI, *rest, draw.flags, turn)]

    experts = _chosen_bytes(draw, case, lora_A_ECI, o.lora_B_EOR)
    return Step(launch, lambda: [naive.fused(o.x_TI.float(), *rest)], rows_OI.nbytes + experts)


def _linear(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    """The frozen product alone, ours or the library's."""
    o = Linear(draw, case, names)
    weight_OI = o.rows(draw)

    def launch() -> list[Tensor]:
        if case.kernel == "library_linear":
            return [F.linear(o.x_TI, weight_OI)]
        return [gemv.linear(o.x_TI, weight_OI, None)]

    return Step(launch, lambda: [naive.linear(o.x_TI.float(), weight_OI, None)], weight_OI.nbytes)


def _route(case: Case, draw: Draw, names: tuple[str, ...]) -> Step:
    assert case.tokens is not None
    x_TI, router_GEI = draw.normal(case.tokens, draw.sizes.hidden), draw.router(1, draw.sizes.hidden)
    rest = x_TI, router_GEI, draw.sizes.top_k, False
    return Step(lambda: [*route.route(*rest)], lambda: [*naive.route(*rest)], router_GEI.nbytes)


def _chosen_bytes(draw: Draw, case: Case, *factors: Tensor) -> float:
    """Of the experts that a batch is expected to choose."""
    assert case.tokens is not None
    sizes = draw.sizes
    read = experts_read(sizes.experts, sizes.top_k, StrategyName.gather, case.tokens)
    return read * sum(factor.nbytes for factor in factors) / sizes.experts


STEPS: dict[str, Callable[[Case, Draw, tuple[str, ...]], Step]] = {
    "shrink_expand": _shrink_expand,
    "expand_all": _expand_all,
    "gather": _gather,
    "gather_routed": _gather_routed,
    "dense": _dense,
    "fused": _fused,
    "linear": _linear,
    "library_linear": _linear,
    "route": _route,
}
