"""What is timed of each kernel: one pass over all blocks of a backbone, how it is checked, and the bytes it must move.

In: a `Case`, seeded operands (kernel_operands.py). Out: a `Work`. Of the bytes x, h, y, gates and tables are left out,
which are small beside weights and factors. Letters as in kernels/naive.py. Next: kernel.py, which checks and times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adafuse.bench.kernel_operands import SCALING, WEIGHT_STD, Case, Draw, Step, fp32_copy
from adafuse.bench.kernel_steps import STEPS
from adafuse.config import Kernel
from adafuse.kernels import config as gather_config
from adafuse.kernels import gemv, naive, switch
from adafuse.model.projections import SHARED_INPUT
from adafuse.refusals import KERNEL_TARGETS

MERGES = ("switch", "rebase")
WITH_EXPERTS = ("shrink_expand", "expand_all", "gather", "gather_routed", "dense", "fused")
# kernels that serve so many tokens and no more
MOST_TOKENS = {
    "shrink_expand": gather_config.FEW_TOKENS,
    "fused": gemv.MAX_TOKENS,
    "linear": gemv.MAX_TOKENS,
}

Pair = tuple[Tensor, Tensor]


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


def cases(knobs: Kernel) -> list[Case]:
    """Every combination that a kernel depends on; merges alone take `targets`, the others have experts everywhere."""
    found = []
    for name in knobs.kernels:
        ranks: list[int | None] = [*knobs.ranks] if name in (*MERGES, *WITH_EXPERTS) else [None]
        most = MOST_TOKENS.get(name, max(knobs.tokens))
        tokens: list[int | None] = [None] if name in MERGES else [t for t in knobs.tokens if t <= most]
        targets = knobs.targets if name in MERGES else ["all"]
        found += [Case(name, target, rank, t) for target in targets for rank in ranks for t in tokens]
    return found


def build(case: Case, draw: Draw) -> Work:
    """Draw the operands of `case`; they live as long as the result."""
    if case.kernel in MERGES:
        return _merge(case, draw)
    groups: list[tuple[str, ...]] = [("router",)] if case.kernel == "route" else list(SHARED_INPUT)
    steps = [STEPS[case.kernel](case, draw, names) for _ in range(draw.sizes.blocks) for names in groups]
    ends = [*steps[: len(groups)], *steps[-len(groups) :]]
    plain = case.kernel in ("dense", "library_linear")
    return Work(
        run=lambda: _launch(steps),
        check=lambda: [pair for step in ends for pair in _pairs(step)],
        naive=None if plain else lambda: [step.wanted() for step in steps[: len(groups)]],
        bytes=sum(step.bytes for step in steps),
        shape=_shape(draw, groups),
        dtype=torch.float32 if case.kernel == "route" else draw.dtype,
    )


def _launch(steps: list[Step]) -> None:
    """Results are dropped one by one, so that a pass writes to the same little memory, as a decode step does."""
    for step in steps:
        step.launch()


def _pairs(step: Step) -> list[Pair]:
    wanted = step.wanted()
    return list(zip(step.launch(), wanted, strict=True))


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
        wanted = [fp32_copy(clean[i]) for i in ends]
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
        shape=_shape(draw, [(name,) for name in names]),
        dtype=draw.dtype,
        copies=True,
    )


def _shape(draw: Draw, groups: list[tuple[str, ...]]) -> str:
    """Such as `32 x [q,k,v: 4096 -> 12288, o: 4096 -> 4096]`."""
    sizes = draw.sizes
    linears = {**sizes.linears, "router": (sizes.experts, sizes.hidden)}
    parts = [
        f"{','.join(name.removesuffix('_proj') for name in names)}: {linears[names[0]][1]} -> "
        f"{sum(linears[name][0] for name in names)}"
        for names in groups
    ]
    return f"{sizes.blocks} x [{', '.join(parts)}]"
