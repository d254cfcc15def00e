"""Runtime `lean`: a decode step of five launches a layer, written out, captured in a CUDA graph.

In and out: as decoders.py says. The weights are the model's own (projections.py), prefill is transformers', the cache
is that of graph.py; a step is `decode_step`, whose launches are kernels/lean.py, attend.py and ends.py. A gate that all
layers share, and a router per linear, add none to a layer; PESC's bottleneck adds one. `switch` and `rebase` write into
the weights before the first layer that they change. A step that would run on other memory than the model has now is
refused. Next: kernels/README.md, section lean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.geometry import decision_blocks, watched_block
from adafuse.adapters.layers import MixtureMlp
from adafuse.adapters.router import NORM_EPS, Gates, Router
from adafuse.config import RouterInput, Runtime, StrategyName
from adafuse.engine.graph import Static
from adafuse.kernels.attend import Attend, Partial, attend, room
from adafuse.kernels.beside import DOWN, Beside, scratch
from adafuse.kernels.config import GEMV_TOKENS, AttendCut, attend_cut, cdiv
from adafuse.kernels.ends import Decision, Next, choose_next, decide, embed, pieces_of
from adafuse.kernels.lean import Norm, Product, Residual, product
from adafuse.model.llama import blocks_of, mlp_path, window_of_each_block
from adafuse.model.projections import Projection
from adafuse.refusals import LEAN_MAX_BATCH, MERGING
from adafuse.strategies.resident import Factors, Resident

# their frequencies hang on how long a sequence is
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass
class Block:
    """The launches of one layer. With `serial` (PESC) `down` leaves the MLP's output to it."""

    qkv: Product
    attend: Attend
    out: Product
    gate_up: Product
    down: Product
    serial: Product | None = None


@dataclass
class Plan:
    """All launches of a step. `decides`: by a product, what decides right before it, for itself and those behind it."""

    token_T: Tensor
    embedding_VD: Tensor
    embedded: Residual
    blocks: list[Block]
    head: Product
    next: Next
    said: list[tuple[Router, Gates]]
    decides: dict[int, Callable[[], None]] = field(default_factory=dict)


def decode_step(plan: Plan) -> None:
    """One token of each sequence, from its id to the next one's."""
    embed(plan.token_T, plan.embedding_VD, plan.embedded)
    for block in plan.blocks:
        attention(plan, block)
        mlp(plan, block)
    project(plan, plan.head)
    choose_next(plan.next)


def attention(plan: Plan, block: Block) -> None:
    project(plan, block.qkv)
    attend(block.attend)
    project(plan, block.out)


def mlp(plan: Plan, block: Block) -> None:
    project(plan, block.gate_up)
    project(plan, block.down)
    if block.serial is not None:
        project(plan, block.serial)


def project(plan: Plan, work: Product) -> None:
    if id(work) in plan.decides:
        plan.decides[id(work)]()
    product(work)


class Lean(Static):
    """Static's state, with a step of our own. Raises ValueError, one line, for a model that it cannot run."""

    def __init__(
        self, model: nn.Module, adapter: Adapter | None, strategy: StrategyName, length: int
    ) -> None:
        refuse_model(model)
        super().__init__(model, adapter, strategy, Runtime.lean, length)
        # an adapter may stand in a layer's place for its MLP when they are asked for
        self._layers = list(blocks_of(model))
        if strategy not in MERGING:
            self._strategy = Resident()
        self._plan: Plan | None = None

    @contextmanager
    def sampling(self, temperature: float, seed: int) -> Iterator[None]:
        """Inside, `run` draws each token from the softmax of logits / temperature; the same seed draws the same."""
        self._temperature.fill_(temperature)
        self._seed.fill_(seed)
        try:
            yield
        finally:
            self._temperature.zero_()

    def _allocate(self, batch: int, device: torch.device) -> None:
        if batch > LEAN_MAX_BATCH:
            raise ValueError(
                f"batch={batch} exceeds the {LEAN_MAX_BATCH} rows that runtime lean serves: use graph"
            )
        super()._allocate(batch, device)
        self._temperature = torch.zeros(1, device=device)
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)

    def again(self, ids_BS: Tensor) -> None:
        super().again(ids_BS)
        if self._plan is not None:
            # a step that was broken off has left some raised, and what it shrank
            self._plan.next.flags.fill_(DOWN)

    def _addresses_now(self) -> list[int]:
        """Of every weight that a step reads, the adapter's own too: their number changes if one is replaced."""
        return [p.data_ptr() for p in self.model.parameters()] + [
            p.data_ptr() for p in (self.adapter.parameters() if self.adapter else [])
        ]

    def _step(self) -> None:
        if self._plan is None:
            self._plan = make_plan(self)
        decode_step(self._plan)

    def _uncaptured(self) -> None:
        self._step()
        self._say()

    def _capture(self) -> Callable[[], None]:
        replay = super()._capture()
        self._say()
        return replay

    def _say(self) -> None:
        assert self._plan is not None
        self.said = self._plan.said


def refuse_model(model: nn.Module) -> None:
    """Raises ValueError for a model whose step would not be the one written here."""
    config, attention = model.config, blocks_of(model)[0].self_attn
    rotary = model.get_submodule("model.rotary_emb")
    if rotary.rope_type in LENGTH_DEPENDENT:
        raise ValueError(
            f"rope_type={rotary.rope_type} has other frequencies at other lengths, and runtime lean has one table: use "
            "runtime=graph"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act}: runtime lean knows silu alone, use runtime=graph")
    if 2 * rotary.inv_freq.numel() != attention.head_dim:
        raise ValueError(
            "runtime lean turns whole heads, and this model's RoPE a part of them: use runtime=graph"
        )


@dataclass
class Flow:
    """What the launches of a step hand on, each written whole before it is read, and what their experts share."""

    sum_TD: Tensor
    normed_TD: Tensor
    qkv_TO: Tensor
    heads_TO: Tensor
    inner_TM: Tensor
    mlp_TD: Tensor
    angles: tuple[Tensor, Tensor]
    partial: Partial
    attend_cut: AttendCut
    # gates [T, K] that all layers share
    index_TK: Tensor
    weight_TK: Tensor
    # one for each product with experts; behind them room for each h that is its own flag, of which `used` is taken
    flags: Tensor
    used: int
    turns: Iterator[int]
    said: list[tuple[Router, Gates]]


def make_plan(decoder: Lean) -> Plan:
    """The launches of a step of `decoder`, whose adapter is installed and whose prompt is in the cache."""
    model, adapter, strategy = decoder.model, decoder.adapter, decoder._strategy
    of = strategy.of if adapter is not None and isinstance(strategy, Resident) else {}
    flow, layers, final = _flow(decoder, of), decoder._layers, model.model.norm
    norms = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
    following = [*(first for first, _ in norms[1:]), final]
    starts = [] if adapter is None else decision_blocks(adapter.method, adapter.geometry, len(layers))
    embedded = Residual(
        flow.sum_TD, norms[0][0].weight, flow.normed_TD, flow.sum_TD.new_empty(decoder._rows, 1)
    )
    squares_TP, blocks = embedded.squares_TP, []
    for number, ((first, second), after) in enumerate(zip(norms, following, strict=True)):
        if number in starts[1:]:
            flow.index_TK, flow.weight_TK = map(torch.zeros_like, (flow.index_TK, flow.weight_TK))
        qkv, out, gate_up, down = decoder._projections[4 * number : 4 * number + 4]
        serial = of.get((mlp_path(number),))
        read = _joined(flow, qkv, of, flow.normed_TD, flow.qkv_TO, _norm(first, squares_TP))
        added = _added(flow, _joined(flow, out, of, flow.heads_TO), second)
        wide = _joined(flow, gate_up, of, flow.normed_TD, flow.inner_TM, _left(second, added), gated=True)
        block = Block(
            read, _attend(decoder, number, flow), added, wide, _joined(flow, down, of, flow.inner_TM)
        )
        if (
            block.gate_up.beside is not None
            and block.down.beside is not None
            and _is_mixture(decoder, number)
        ):
            block.gate_up, block.down = _mixed(flow, block.gate_up, block.down)
        if serial is None:
            block.down = last = _added(flow, block.down, after)
        else:
            router = _logits(flow, serial)
            block.gate_up = replace(wide, beside=router)
            block.down = replace(block.down, y_TO=flow.mlp_TD)
            experts = _beside(flow, serial, router.h)
            block.serial = last = _added(flow, Product(flow.mlp_TD, None, beside=experts), after)
        squares_TP = _left(after, last).squares_TP
        blocks.append(block)
    head, norm = model.get_output_embeddings(), _norm(final, squares_TP)
    logits = Product(flow.normed_TD, head.weight, head.bias, decoder.logits_BV, norm)
    embedding_VD = model.get_input_embeddings().weight
    plan = Plan(
        decoder.token_B1.view(-1), embedding_VD, embedded, blocks, logits, _next(decoder, flow), flow.said
    )
    if adapter is not None:
        for router in adapter.token_routers.values():
            _share_gates(decoder, adapter, plan, flow, router)
    return plan


def _joined(
    flow: Flow,
    own: Projection,
    of: Mapping[tuple[str, ...], Factors],
    x_TI: Tensor,
    y_TO: Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
) -> Product:
    """A projection with its experts, if it has any."""
    beside = _beside(flow, of[own.paths]) if own.paths in of else None
    return Product(x_TI, own.weight_OI, own.bias_O, y_TO, norm, gated=gated, beside=beside)


def _added(flow: Flow, work: Product, following: nn.Module) -> Product:
    """`work` into the sum of all layers' outputs, ready for the norm that reads it next."""
    tiles = -(-work.outputs // work.fitted().rows)
    squares_TP = flow.sum_TD.new_empty(len(flow.sum_TD), tiles)
    return replace(work, residual=Residual(flow.sum_TD, following.weight, flow.normed_TD, squares_TP))


def _norm(module: nn.Module, squares_TP: Tensor) -> Norm:
    return Norm(squares_TP, module.variance_epsilon)


def _left(module: nn.Module, before: Product) -> Norm:
    """The norm of what `before` adds to."""
    assert before.residual is not None
    return _norm(module, before.residual.squares_TP)


def _beside(flow: Flow, own: Factors, logits: Tensor | None = None) -> Beside:
    """Experts with the gates that all layers share, or with their own routers' (whose choice is said)."""
    tokens, groups, routed = len(flow.sum_TD), len(own.members), bool(own.routers)
    low = _low(flow, scratch(tokens, len(own.rows_SI), groups, own.rank, own.top_k, not routed), not routed)
    index, weight = flow.index_TK, flow.weight_TK
    if routed:
        index, weight = _gates(tokens, len(own.routers), own.top_k, device=low.device)
        empty = low.new_empty(0)
        flow.said += [
            (router, Gates(index[:, g], weight[:, g], empty)) for g, router in enumerate(own.routers)
        ]
        logits = low[:, own.shrunk :] if logits is None else logits
    return Beside(
        rows_SI=own.rows_SI,
        lora_B_EOR=own.lora_B_EOR,
        members=own.members,
        experts=own.experts,
        rank=own.rank,
        top_k=own.top_k,
        scaling=own.scaling,
        index=index,
        weight=weight,
        h=low,
        flags=flow.flags,
        turn=next(flow.turns),
        logits=logits,
        raw=routed and own.routers[0].is_raw,
        gelu=own.gelu,
        ready=not routed,
    )


def _logits(flow: Flow, own: Factors) -> Beside:
    """PESC's router, beside the product that reads what it reads; nobody waits for it."""
    assert own.apart_EI is not None
    low = torch.empty(len(flow.sum_TD), own.experts, device=flow.sum_TD.device)
    unused = flow.index_TK, flow.weight_TK, low, flow.flags, 0
    return Beside(own.apart_EI, None, [], own.experts, 1, own.top_k, 1.0, *unused)


def _low(flow: Flow, shape: tuple[int, int], known: bool) -> Tensor:
    """Room for h, among the flags where it is its own flag."""
    if not (known and len(flow.sum_TD) <= GEMV_TOKENS):
        return torch.empty(shape, device=flow.sum_TD.device)
    begin, words = flow.used, math.prod(shape)
    flow.used += _aligned(words)
    return flow.flags[begin : begin + words].view(torch.float32).view(shape)


def _aligned(words: int) -> int:
    return 4 * cdiv(words, 4)


def _is_mixture(decoder: Lean, number: int) -> bool:
    site = None if decoder.adapter is None else decoder.adapter.sites.get(mlp_path(number))
    return isinstance(site, MixtureMlp)


def _mixed(flow: Flow, gate_up: Product, down: Product) -> tuple[Product, Product]:
    """MixLoRA's: what the one chooses the other takes, and A of the other has an input for each choice."""
    wide, narrow = gate_up.beside, down.beside
    assert wide is not None and narrow is not None
    tokens, top_k = len(flow.sum_TD), wide.top_k
    slots = flow.inner_TM.new_empty(tokens * top_k, flow.inner_TM.shape[1])
    low = scratch(tokens, len(narrow.rows_SI), 1, narrow.rank, top_k, known=True, slots=True)
    h, index, weight = _low(flow, low, known=True), wide.index[:, 0], wide.weight[:, 0]
    narrow = replace(narrow, slots=slots, h=h, index=index, weight=weight, ready=False)
    return replace(gate_up, beside=replace(wide, slots=slots)), replace(down, beside=narrow)


def _gates(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Experts and weights: of plain LoRA, if nobody writes there."""
    return torch.zeros(shape, dtype=torch.int64, device=device), torch.ones(shape, device=device)


def _share_gates(decoder: Lean, adapter: Adapter, plan: Plan, flow: Flow, router: Router) -> None:
    """One decision, where the method takes it, for the layers behind it; the first of them waits until it is taken."""
    (owner, name), table = _decides_before(decoder, adapter, plan, router), adapter.context.gate_table
    behind: Product = getattr(owner, name)
    of_linear = adapter.method.router_input is RouterInput.first_linear
    tokens, experts = len(flow.sum_TD), router.weight.shape[0] - router.null_expert
    index_TK, weight_TK = flow.index_TK, flow.weight_TK
    if behind.beside is not None:
        index_TK, weight_TK = behind.beside.index, behind.beside.weight
    gates = Gates(index_TK, weight_TK, flow.sum_TD.new_empty(tokens, experts))
    gates.used_T = gates.weight_TK if router.null_expert else None
    work = Decision(
        x_TI=behind.x_TI if of_linear else flow.sum_TD,
        norm=behind.norm if of_linear else None,
        router_EI=router.weight.detach(),
        index_TK=gates.index_TK,
        weight_TK=gates.weight_TK,
        probs_TE=gates.probs_TE,
        raw=router.is_raw,
        null=router.null_expert,
        normed=NORM_EPS if router.norm else None,
        table_NTK=None if table is None else table.index_NBK[:, :tokens].contiguous(),
        used_NT=None if table is None or table.used_NB is None else table.used_NB[:, :tokens].contiguous(),
        step_1=None if table is None else table.step,
    )
    flow.said.append((router, gates))

    def decide_for_all() -> None:
        decide(work)
        # a merging strategy writes its weights here, another has nothing to do
        decoder._strategy.decide(gates)

    beside = None if behind.beside is None else replace(behind.beside, ready=False)
    first = replace(behind, beside=beside, alone=True)
    plan.decides[id(first)] = decide_for_all
    setattr(owner, name, first)


def _decides_before(decoder: Lean, adapter: Adapter, plan: Plan, router: Router) -> tuple[Block | Plan, str]:
    """Whose product comes right behind the decision, and its name there."""
    if adapter.method.router_input is not RouterInput.first_linear:
        watched = watched_block(adapter.method)
        begin = 0 if watched is None else watched + 1
        return (plan.blocks[begin], "qkv") if begin < len(plan.blocks) else (plan, "head")
    path = next(path for path, site in adapter.sites.items() if site.decides is router)
    place = next(i for i, own in enumerate(decoder._projections) if path in own.paths)
    return plan.blocks[place // 4], ("qkv", "out", "gate_up", "down")[place % 4]


def _flow(decoder: Lean, of: Mapping[tuple[str, ...], Factors]) -> Flow:
    """Room for a step; products `of` an adapter have experts beside them."""
    model, adapter, tokens = decoder.model, decoder.adapter, decoder._rows
    config, attention, device = model.config, decoder._layers[0].self_attn, decoder.position.device
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    cut = attend_cut(tokens, kv_heads, decoder.length)
    top_k = 1 if adapter is None or adapter.token_router is None else adapter.token_router.top_k

    def fresh(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
        return torch.empty(tokens, width, dtype=dtype, device=device)

    index_TK, weight_TK = _gates(tokens, top_k, device=device)
    few = of.values() if tokens <= GEMV_TOKENS else []
    lows = sum(_aligned(tokens * own.top_k * len(own.members) * own.rank) for own in few)
    turns = _aligned(len(of) + 1)
    return Flow(
        sum_TD=fresh(config.hidden_size, torch.float32),
        normed_TD=fresh(config.hidden_size),
        qkv_TO=fresh((heads + 2 * kv_heads) * attention.head_dim, torch.float32),
        heads_TO=fresh(heads * attention.head_dim),
        inner_TM=fresh(config.intermediate_size),
        mlp_TD=fresh(config.hidden_size),
        angles=_angles(model, decoder.length),
        partial=room(tokens, kv_heads, heads // kv_heads, attention.head_dim, cut, device),
        attend_cut=cut,
        index_TK=index_TK,
        weight_TK=weight_TK,
        flags=torch.full((turns + lows,), DOWN, dtype=torch.int32, device=device),
        used=turns,
        turns=count(),
        said=[],
    )


def _angles(model: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head width / 2] in fp32, with what this kind of RoPE scales them by."""
    rotary = model.get_submodule("model.rotary_emb")
    angles = torch.arange(length, device=rotary.inv_freq.device)[:, None] * rotary.inv_freq.float()
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


def _attend(decoder: Lean, number: int, flow: Flow) -> Attend:
    own, cache = decoder._layers[number].self_attn, decoder.cache.layers[number]
    q_norm, k_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
    return Attend(
        qkv=flow.qkv_TO,
        keys=cache.keys,
        values=cache.values,
        out=flow.heads_TO,
        cos=flow.angles[0],
        sin=flow.angles[1],
        position=decoder.position,
        pads_B=decoder.pads_B1.view(-1),
        q_norm=q_norm and q_norm.weight,
        k_norm=k_norm and k_norm.weight,
        eps=q_norm.variance_epsilon if q_norm is not None else 0.0,
        scale=own.scaling,
        window=window_of_each_block(decoder.model.config)[number],
        partial=flow.partial,
        cut=flow.attend_cut,
    )


def _next(decoder: Lean, flow: Flow) -> Next:
    tokens, words = decoder.logits_BV.shape
    table = None if decoder.adapter is None else decoder.adapter.context.gate_table
    pieces, device = pieces_of(words), decoder.position.device
    return Next(
        logits_TV=decoder.logits_BV,
        token_T=decoder.token_B1.view(-1),
        ids_TM=decoder.ids_BM,
        position=decoder.position,
        step=None if table is None else table.step,
        temperature=decoder._temperature,
        seed=decoder._seed,
        best=torch.empty(tokens, pieces, device=device),
        found=torch.empty(tokens, pieces, dtype=torch.int32, device=device),
        ended=torch.zeros(1, dtype=torch.int32, device=device),
        flags=flow.flags,
    )
