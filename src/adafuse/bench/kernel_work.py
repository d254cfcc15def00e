"""What is timed of each kernel: one pass over all blocks of a backbone, how it is checked, and the bytes it must move.

In: a configuration, a `Case`. Out: a `Work` with seeded operands, never the same for two blocks, so that a pass reads
gigabytes and no cache answers. Experts are made as large as the weights: a mistake in them could otherwise hide behind
the rounding of the rest. Biases are left out; of the bytes, x, h, y, gates and tables, which are small beside weights
and factors. The kernels are called as they are, without the operators of ops.py, so that a CPU runs them too (in
Triton's interpreter). Letters as in kernels/naive.py. Next: kernels/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from adafuse.bench.cost import experts_read
from adafuse.config import Config, StrategyName
from adafuse.kernels import fused, gather, naive, route, switch
from adafuse.kernels.config import Members
from adafuse.model.projections import SHARED_INPUT
from adafuse.refusals import KERNEL_TARGETS
from adafuse.shape import shape_of, widths
from adafuse.strategies.dense import expand_masked_, members_up

MERGES = ("switch", "rebase")
WITH_EXPERTS = ("shrink_expand", "expand_all", "gather", "gather_routed", "dense", "fused")
ROUTER = "router"
WEIGHT_STD = 0.02
SCALING = 2.0  # alpha / rank, as in conf/experts

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A kernel and what it depends on; None where it does not. Only a merge is asked of less than all linears."""

    kernel: str
    targets: str
    rank: int | None
    tokens: int | None


@dataclass(frozen=True)
class Sizes:
    """`linears` holds (O, I) by name; every block has the same."""

    blocks: int
    hidden: int
    linears: dict[str, tuple[int, int]]
    experts: int
    top_k: int

    def of(self, name: str) -> tuple[int, int]:
        """(O, I) of a linear, or of the router that all of them share."""
        return (self.experts, self.hidden) if name == ROUTER else self.linears[name]


def sizes_of(config: Config) -> Sizes:
    """The linears of the configured backbone, the number of experts of the configured cell."""
    shape, experts = shape_of(config.model), config.experts
    linears = {name: (outputs, inputs) for name, (inputs, outputs) in widths(shape).items()}
    return Sizes(shape["num_hidden_layers"], shape["hidden_size"], linears, experts.count, experts.top_k)


@dataclass
class Draw:
    """Seeded values, made on the device."""

    sizes: Sizes
    where: str
    dtype: torch.dtype
    generator: torch.Generator

    def __post_init__(self) -> None:
        # of the launches of a pass that wait inside (kernels/fused.py): as many as projections, used in turn
        self.turns = count()
        self.flags = torch.zeros(self.sizes.blocks * len(SHARED_INPUT), dtype=torch.int32, device=self.where)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        fresh = torch.empty(shape, dtype=dtype or self.dtype, device=self.where)
        return fresh.normal_(0.0, std, generator=self.generator)

    def down(self, rows: int, inputs: int) -> Tensor:
        """lora_A of all experts, [E, rows, I]."""
        return self.normal(self.sizes.experts, rows, inputs, std=WEIGHT_STD)

    def up(self, outputs: int, rank: int) -> Tensor:
        """lora_B of all experts, [E, O, R], such that B A is as large as the weights."""
        return self.normal(self.sizes.experts, outputs, rank, std=rank**-0.5)

    def gates(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Distinct experts [T, K] of every token, all equally likely, and weights [T, K] that sum to one."""
        scores = torch.rand(tokens, self.sizes.experts, generator=self.generator, device=self.where)
        weight_TK = torch.softmax(self.normal(tokens, self.sizes.top_k, dtype=torch.float32), dim=-1)
        return scores.topk(self.sizes.top_k, dim=-1).indices, weight_TK


class Operands:
    """One projection of one block: its input x and the linears (`names`) that share it; where the case has a rank also
    experts on all of them: B, and each token's gates. A comes in two layouts.
    """

    def __init__(self, draw: Draw, case: Case, names: tuple[str, ...]) -> None:
        assert case.tokens is not None
        self.draw, self.names = draw, names
        widths = [draw.sizes.of(name)[0] for name in names]
        self.inputs, self.outputs = draw.sizes.of(names[0])[1], sum(widths)
        starts = [sum(widths[:g]) for g in range(len(names))]
        self.members: Members = list(zip(starts, widths, strict=True))
        self.x_TI = draw.normal(case.tokens, self.inputs)
        if case.rank is not None:
            self.columns = len(names) * case.rank
            self.shrunk = draw.sizes.experts * self.columns
            self.lora_B_EOR = draw.up(self.outputs, case.rank)
            self.index_TK, self.weight_TK = draw.gates(case.tokens)
            self.chosen_TGK = self.index_TK[:, None], self.weight_TK[:, None]

    def rows(self, spare: int = 0) -> Tensor:
        """The joined weight, and `spare` rows behind it."""
        return self.draw.normal(self.outputs + spare, self.inputs, std=WEIGHT_STD)

    def product(self, rows_OI: Tensor, exact: bool) -> Tensor:
        """The library's, or `exact`."""
        return naive.linear(self.x_TI.float(), rows_OI, None) if exact else F.linear(self.x_TI, rows_OI)

    def expanded(self, y_and_u: Tensor, exact: bool) -> list[Tensor]:
        """y of a product with u = A x behind it, with the chosen experts' B u added in place."""
        kernels, (y_TO, u_TS) = naive if exact else gather, y_and_u.tensor_split([self.outputs], dim=1)
        kernels.expand_all_(y_TO, u_TS, self.lora_B_EOR, *self.chosen_TGK, self.members, SCALING)
        return [y_TO]

    def chosen_bytes(self, *factors: Tensor) -> float:
        """Of the experts that a batch is expected to choose."""
        sizes = self.draw.sizes
        read = experts_read(sizes.experts, sizes.top_k, StrategyName.gather, len(self.x_TI))
        return read * sum(factor.nbytes for factor in factors) / sizes.experts


@dataclass
class Step:
    """One call of a kernel: `run(exact=True)` is the same in fp32 by naive.py and leaves the operands alone."""

    run: Callable[[bool], list[Tensor]]
    bytes: float


@dataclass
class Work:
    """`run` is the pass, `naive` one block of it by naive.py (None where a library's product is plain already).

    `check` runs the first and the last block and gives (got, wanted) of each result; `dtype` is that of the results.
    `bytes` are read, or (`copies`) half of them written.
    """

    run: Callable[[], object]
    check: Callable[[], list[Pair]]
    naive: Callable[[], object] | None
    bytes: float
    shape: str
    dtype: torch.dtype
    copies: bool = False


def build(case: Case, draw: Draw) -> Work:
    """Draw the operands of `case`; they live as long as the result."""
    if case.kernel in MERGES:
        return _merge(case, draw)
    step_of = STEPS[case.kernel]
    groups: list[tuple[str, ...]] = [(ROUTER,)] if case.kernel == "route" else list(SHARED_INPUT)
    steps = [step_of(Operands(draw, case, names)) for _ in range(draw.sizes.blocks) for names in groups]
    ends = [*steps[: len(groups)], *steps[-len(groups) :]]
    plain = case.kernel in ("dense", "library_linear")
    return Work(
        run=lambda: _launch(steps),
        check=lambda: [pair for step in ends for pair in _pairs(step)],
        naive=None if plain else lambda: [step.run(True) for step in steps[: len(groups)]],
        bytes=sum(step.bytes for step in steps),
        shape=_shape(draw.sizes, groups),
        dtype=torch.float32 if case.kernel == "route" else draw.dtype,
    )


def _launch(steps: list[Step]) -> None:
    """Results are dropped one by one, so that a pass writes to the same little memory, as a decode step does."""
    for step in steps:
        step.run(False)


def _pairs(step: Step) -> list[Pair]:
    # first, because a kernel may write into its operands
    wanted = step.run(True)
    return list(zip(step.run(False), wanted, strict=True))


def _shrink_expand(o: Operands) -> Step:
    """The chosen experts alone, for a few tokens, in two launches."""
    lora_A_ECI, drawn_TO = o.draw.down(o.columns, o.inputs), o.draw.normal(len(o.x_TI), o.outputs)

    def run(exact: bool) -> list[Tensor]:
        kernels, y_TO = naive if exact else gather, _fp32_copy(drawn_TO) if exact else drawn_TO
        h_PTKC = kernels.shrink(o.x_TI, lora_A_ECI, o.index_TK)
        kernels.expand_(y_TO, h_PTKC, o.lora_B_EOR, o.index_TK, o.weight_TK, o.members, SCALING)
        return [y_TO]

    return Step(run, o.chosen_bytes(lora_A_ECI, o.lora_B_EOR))


def _expand_all(o: Operands) -> Step:
    """The chosen experts' B, in one launch; u = A x stands behind y."""
    product = o.draw.normal(len(o.x_TI), o.outputs + o.shrunk)
    moved = o.chosen_bytes(o.lora_B_EOR)
    return Step(lambda exact: o.expanded(_fp32_copy(product) if exact else product, exact), moved)


def _gather(o: Operands) -> Step:
    """The whole projection: the library's product with all A behind the weight, then `expand_all`."""
    rows_OI = o.rows(spare=o.shrunk)
    moved = rows_OI.nbytes + o.chosen_bytes(o.lora_B_EOR)
    return Step(lambda exact: o.expanded(o.product(rows_OI, exact), exact), moved)


def _gather_routed(o: Operands) -> Step:
    """The same with a router for each member, whose rows stand behind A: `expand_routed` chooses for itself."""
    draw, experts, groups = o.draw, o.draw.sizes.experts, len(o.names)
    rows_OI = o.rows(spare=o.shrunk + groups * experts)
    # every token ranks the experts in an order of its own, by steps of 4 with little beside: no tie that rounding could
    # turn over
    order_TE = torch.rand(len(o.x_TI), experts, generator=draw.generator, device=draw.where).argsort(-1)
    o.x_TI[:, :experts] = 4.0 * order_TE
    routers_CI = rows_OI[o.outputs + o.shrunk :].mul_(0.05)
    routers_CI[:, :experts] = torch.eye(experts, device=draw.where).repeat(groups, 1)

    def run(exact: bool) -> list[Tensor]:
        kernels, ends = naive if exact else gather, [o.outputs, o.outputs + o.shrunk]
        y_TO, u_TS, logits_TS = o.product(rows_OI, exact).tensor_split(ends, dim=1)
        knobs = o.members, draw.sizes.top_k, False, SCALING
        return [y_TO, *kernels.expand_routed_(y_TO, u_TS, logits_TS, o.lora_B_EOR, *knobs)]

    return Step(run, rows_OI.nbytes + o.chosen_bytes(o.lora_B_EOR))


def _dense(o: Operands) -> Step:
    """The whole projection in library products: all experts, and a mask of gates."""
    rows_OI, ups = o.rows(spare=o.shrunk), members_up(o.lora_B_EOR, o.members, SCALING)
    gates_TE = torch.zeros(len(o.x_TI), o.draw.sizes.experts, device=o.draw.where)
    gates_TGE = gates_TE.scatter(-1, o.index_TK, o.weight_TK)[:, None]

    def run(exact: bool) -> list[Tensor]:
        product = o.product(rows_OI, exact)
        if exact:
            return o.expanded(product, exact)
        y_TO, u_TS = product.tensor_split([o.outputs], dim=1)
        expand_masked_(y_TO, u_TS, gates_TGE, ups)
        return [y_TO]

    return Step(run, rows_OI.nbytes + o.lora_B_EOR.nbytes)


def _fused(o: Operands) -> Step:
    """The whole projection in one launch."""
    rows_OI, lora_A_ECI, turn = o.rows(), o.draw.down(o.columns, o.inputs), next(o.draw.turns)
    rest = rows_OI, None, lora_A_ECI, o.lora_B_EOR, o.index_TK, o.weight_TK, o.members, SCALING

    def run(exact: bool) -> list[Tensor]:
        if exact:
            return [naive.fused(o.x_TI.float(), *rest)]
        return [fused.fused(o.x_TI, *rest, o.draw.flags, turn)]

    return Step(run, rows_OI.nbytes + o.chosen_bytes(lora_A_ECI, o.lora_B_EOR))


def _linear(o: Operands) -> Step:
    """The frozen product alone, ours."""
    weight_OI = o.rows()

    def run(exact: bool) -> list[Tensor]:
        return [o.product(weight_OI, exact) if exact else fused.linear(o.x_TI, weight_OI, None)]

    return Step(run, weight_OI.nbytes)


def _library_linear(o: Operands) -> Step:
    """The frozen product alone, the library's."""
    weight_OI = o.rows()
    return Step(lambda exact: [o.product(weight_OI, exact)], weight_OI.nbytes)


def _route(o: Operands) -> Step:
    """One router for one token step; its logits are of size one."""
    std, shape = o.inputs**-0.5, (1, o.outputs, o.inputs)
    router_GEI = o.draw.normal(*shape, std=std, dtype=torch.float32)
    rest = o.x_TI, router_GEI, o.draw.sizes.top_k, False
    return Step(lambda exact: [*(naive if exact else route).route(*rest)], router_GEI.nbytes)


STEPS: dict[str, Callable[[Operands], Step]] = {
    "shrink_expand": _shrink_expand,
    "expand_all": _expand_all,
    "gather": _gather,
    "gather_routed": _gather_routed,
    "dense": _dense,
    "fused": _fused,
    "linear": _linear,
    "library_linear": _library_linear,
    "route": _route,
}


def _merge(case: Case, draw: Draw) -> Work:
    """All adapted linears of all blocks in one launch; 2K slots for a switch, K for a rebase."""
    assert case.rank is not None
    sizes, names, rebase = draw.sizes, KERNEL_TARGETS[case.targets], case.kernel == "rebase"
    shapes = [sizes.linears[name] for name in names] * sizes.blocks
    slots = sizes.top_k if rebase else 2 * sizes.top_k
    order = torch.randperm(sizes.experts, generator=draw.generator, device=draw.where)
    gates = order.repeat(2)[:slots], SCALING * draw.normal(slots, dtype=torch.float32)
    # of the token before, which was not left to the backbone either
    held = gates[1]
    downs = [draw.down(case.rank, inputs) for _, inputs in shapes]
    ups = [draw.up(outputs, case.rank) for outputs, _ in shapes]
    clean = [draw.normal(*shape, std=WEIGHT_STD) for shape in shapes]
    # whatever rebase finds in the weights must not matter
    weights = [torch.full_like(weight, float("nan")) for weight in clean] if rebase else clean
    plan = switch.plan(weights, clean if rebase else None, downs, ups)

    def run() -> None:
        if rebase:
            switch.rebase_(plan, *gates, held)
        else:
            switch.switch_(plan, *gates)

    def check() -> list[Pair]:
        ends = [*range(len(names)), *range(len(shapes) - len(names), len(shapes))]
        wanted = [_fp32_copy(clean[i]) for i in ends]
        naive.switch_(wanted, [downs[i] for i in ends], [ups[i] for i in ends], *gates)
        run()
        return list(zip([weights[i] for i in ends], wanted, strict=True))

    one = slice(len(names))
    elements = sum(2 * o * i + min(slots, sizes.experts) * case.rank * (o + i) for o, i in shapes)
    return Work(
        run=run,
        check=check,
        naive=lambda: naive.rebase_(weights[one], clean[one], downs[one], ups[one], *gates, held),
        bytes=elements * draw.dtype.itemsize,
        shape=_shape(sizes, [(name,) for name in names]),
        dtype=draw.dtype,
        copies=True,
    )


def _shape(sizes: Sizes, groups: list[tuple[str, ...]]) -> str:
    """Such as `32 x [q,k,v: 4096 -> 12288, o: 4096 -> 4096]`."""
    parts = [
        f"{','.join(name.removesuffix('_proj') for name in names)}: {sizes.of(names[0])[1]} -> "
        f"{sum(sizes.of(name)[0] for name in names)}"
        for names in groups
    ]
    return f"{sizes.blocks} x [{', '.join(parts)}]"


def _fp32_copy(operand: Tensor) -> Tensor:
    """To be written in place, whatever the dtype was."""
    return operand.to(torch.float32, copy=True)
