"""The modules that stand in the backbone's place: an adapted linear, PESC's and MixLoRA's MLP.

In: the hidden states of the backbone, [B, S, I]. Out: the same shape as the module they replace. They flatten to
[T, I], find their gates, and leave the arithmetic to the strategy in their shared `Context`.
Next: adapter.py, which builds and installs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.adapters.forward import Strategy, UnmergedChosen, UnmergedDense, fitted
from adafuse.adapters.gate_table import GateTable
from adafuse.adapters.router import Gates, Router, is_fit_in_half, routed_together, ungated
from adafuse.kernels import ops

# of MixLoRA's training; it holds nothing
CHOSEN = UnmergedChosen()


@dataclass
class Context:
    """What the modules of one adapter share while a forward runs."""

    # of a decode step; `whole` is that of training and prefill
    decode: Strategy = field(default_factory=UnmergedDense)
    whole: Strategy = field(default_factory=UnmergedDense)
    decoding: bool = False
    # the linears are the plain backbone's
    silent: bool = False
    # token routing: the gates of these tokens, for all layers
    gates: Gates | None = None
    # collected only while training or when asked: what each router said
    collect: bool = False
    # what decode steps use in place of the router's choice, where a cell asks for it
    gate_table: GateTable | None = None
    said: list[tuple[Router, Gates]] = field(default_factory=list)
    # in a fit: what the first of several linears that share their input has found for the others
    ahead: dict[Router, Gates] = field(default_factory=dict)

    @property
    def strategy(self) -> Strategy:
        return self.decode if self.decoding else self.whole

    def use(self, strategy: Strategy) -> None:
        """From the next forward on."""
        self.decode, self.whole = strategy, strategy if strategy.takes_prompts else UnmergedDense()

    def route(self, router: Router, x_TI: Tensor, beside: Sequence[Router] = ()) -> Gates:
        """The gates [T, K] of this router, or of the table in its place; told to whoever collects.

        `beside` are it and the routers that read the same x, in the order in which they are asked.
        """
        # the kernel knows neither null expert nor norm; such a router, one a token, is a few launches among hundreds
        if self.decoding and self.decode.routes_at_once and not (router.null_expert or router.norm):
            routed = ops.route(x_TI, router.weight.detach()[None], router.top_k, router.is_raw)
            gates = Gates(*(of_all_routers[:, 0] for of_all_routers in routed))
        elif beside and is_fit_in_half(x_TI):
            if router is beside[0]:
                self.ahead = dict(zip(beside, routed_together(beside, x_TI), strict=True))
            gates = self.ahead.pop(router)
        else:
            gates = router(x_TI)
        if self.decoding and self.gate_table is not None:
            gates = self.gate_table.replace(gates, router.is_raw)
        if self.collect:
            self.said.append((router, gates))
        return gates

    def decide(self, router: Router, hidden: Tensor, draft: Gates | None = None) -> None:
        """Token routing's one decision, before the first adapted linear uses it."""
        self.gates = self.route(router, hidden.reshape(-1, hidden.shape[-1]))
        self.gates.draft = draft
        if self.decoding:
            self.decode.decide(self.gates)
        elif torch.is_grad_enabled():
            # found once, and not within a block: where blocks are computed twice, the second time would lack it
            self.gates.dense()


class AdaptedLinear(nn.Module):
    """A frozen linear with experts, with ordinary (static) LoRA, or with both.

    `router`: its own (layer-wise); `beside`: it and those of linears that read the same input. `decides`: its input
    feeds this router, which decides for it and those that follow. `decided_by`: the router whose gates it shares.
    """

    def __init__(self, base: nn.Linear, context: Context, dropout: float) -> None:
        super().__init__()
        self.base, self.context, self.dropout = base, context, dropout
        self.experts: LoraExperts | None = None
        self.static: LoraExperts | None = None
        self.router: Router | None = None
        self.beside: list[Router] = []
        self.decides: Router | None = None
        self.decided_by: Router | None = None
        self.gated = True
        self.static_merged = False

    @property
    def lora(self) -> LoraExperts:
        """The experts, where a strategy is asked to apply them."""
        assert self.experts is not None, "a linear with static LoRA alone has no experts"
        return self.experts

    def drop(self, x_TI: Tensor) -> Tensor:
        return F.dropout(x_TI, self.dropout) if self.training else x_TI

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        plain = self.experts is None or self.context.silent
        y_TO = self.base(x_TI) if plain else self.context.strategy.linear(self, x_TI, self._gates(x_TI))
        if self.static is not None and not self.static_merged:
            y_TO = self._with_static(y_TO, self.static, x_TI)
        return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])

    def _with_static(self, y_TO: Tensor, static: LoraExperts, x_TI: Tensor) -> Tensor:
        if not (self.training and is_fit_in_half(x_TI)):
            return y_TO + static.one(0, self.drop(x_TI))
        return fitted(y_TO, x_TI, static, ungated(x_TI.shape[0], x_TI.device), self.dropout)

    def _gates(self, x_TI: Tensor) -> Gates:
        if not self.gated:
            return ungated(x_TI.shape[0], x_TI.device)
        if self.router is not None:
            return self.context.route(self.router, x_TI, self.beside)
        if self.decides is not None:
            self.context.decide(self.decides, x_TI)
        gates, router = self.context.gates, self.decided_by
        assert gates and router, "token gates are decided before any adapted linear runs"
        if (
            self.training
            and torch.is_grad_enabled()
            and router.weight.requires_grad > gates.weight_TK.requires_grad
        ):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True would leave the router without a gradient: say "
                "use_reentrant=False"
            )
        return gates


class SerialMlp(nn.Module):
    """PESC: `u + sum_e g_e adapter_e(u)` with u the MLP's output; the router reads the MLP's input."""

    static, decides = None, None

    def __init__(
        self, base: nn.Module, experts: BottleneckExperts, router: Router, context: Context, dropout: float
    ) -> None:
        super().__init__()
        self.base, self.experts, self.router = base, experts, router
        self.context, self.dropout = context, dropout

    def forward(self, x: Tensor) -> Tensor:
        gates = self.context.route(self.router, x.reshape(-1, x.shape[-1]))
        u = self.base(x)
        u_TI = F.dropout(u.reshape(-1, u.shape[-1]), self.dropout, self.training)
        return self.context.strategy.add(u, self.experts, u_TI, gates)


class MixtureMlp(nn.Module):
    """MixLoRA: the gated sum of E MLPs that share the frozen weights; the router reads the MLP's input."""

    static, decides = None, None

    def __init__(self, base: nn.Module, experts: MlpLoraExperts, router: Router, context: Context) -> None:
        super().__init__()
        self.base, self.experts, self.router = base, experts, router
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        gates = self.context.route(self.router, x_TI)
        strategy = self.context.strategy
        if self.training and type(strategy) is UnmergedDense and is_fit_in_half(x):
            strategy = CHOSEN
        return strategy.mix(self.experts, x_TI, gates, self.base).view_as(x)


Site = AdaptedLinear | SerialMlp | MixtureMlp
