"""One method's adapter on one backbone: built once, installed and removed as often as arms change.

In: a Llama-family model of transformers, a `Method`, the expert geometry. Out: an `Adapter`; while installed, the
model's own forward is the adapted one, for training, evaluation and timing alike.
Next: reference.py, the same meaning written slowly, and store.py, its files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from adafuse.adapters.build import build_sites, build_token_routers
from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.adapters.forward import Strategy, UnmergedDense
from adafuse.adapters.geometry import follows, watched_block
from adafuse.adapters.hosted import Host
from adafuse.adapters.layers import AdaptedLinear, Context
from adafuse.adapters.previous import follow
from adafuse.adapters.router import DRAFT, Gates, Router, ungated
from adafuse.config import LINEARS, Experts, Method, RouterInput, Routing
from adafuse.model.clean import clean_copy
from adafuse.model.llama import blocks_of
from adafuse.model.projections import Projection, join, placed


class Adapter:
    """Owns the modules it puts into the model; `install` and `remove` leave the backbone's weights as they were."""

    def __init__(self, model: nn.Module, method: Method, geometry: Experts, seed: int) -> None:
        """Raises ValueError for a model that is not built like Llama, or is quantised."""
        self.model, self.method, self.geometry = model, method, geometry
        self.context = Context()
        self.installed = False
        # false: after a sequence a merging strategy takes its selection out and leaves what rounding has left
        self.restores = True
        # the routers alone are trained: whoever brings experts keeps them
        self.experts_frozen = bool(geometry.folders) and method.routing is not Routing.none
        # of the plain backbone, for the strategies that run them as one
        self.projections: list[Projection] = []
        # transformers' own generate, while a strategy is installed
        self.host: Host | None = None
        # what `remove` takes back, the last first
        self._undo = ExitStack()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.sites = build_sites(model, method, geometry, self.context)
            self.token_routers = build_token_routers(model, method, geometry, self.sites)
        # looked up before anything is replaced: MLPs hold linears that are sites too
        split = {path: path.rpartition(".") for path in self.sites}
        self._parents = {path: (model.get_submodule(owner), name) for path, (owner, _, name) in split.items()}
        for module in self.modules():
            module.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def merging(self) -> bool:
        """The installed strategy holds one selection at a time."""
        return self.context.decode.merging

    @property
    def token_router(self) -> Router | None:
        """The first decision of a token, where it is for more than one linear."""
        return next(iter(self.token_routers.values()), None)

    def adapted(self) -> dict[str, AdaptedLinear]:
        """The linears that carry experts, by path, in the order in which they run."""
        linears = {path: site for path, site in self.sites.items() if isinstance(site, AdaptedLinear)}
        return {path: site for path, site in linears.items() if site.experts is not None}

    def modules(self) -> Iterator[nn.Module]:
        """The adapter's own modules, without the frozen ones they wrap."""
        yield from self.token_routers.values()
        for site in self.sites.values():
            for module in (site.experts, site.static, site.router):
                if module is not None:
                    yield module

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules() for p in module.parameters()]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        if self.experts_frozen:
            return [router.weight for router in self.routers().values()]
        return self.parameters()

    def loras(self) -> dict[str, LoraExperts]:
        """Every stacked LoRA by the path of the linear it adapts."""
        found = {}
        for path, site in self.sites.items():
            if isinstance(site.experts, LoraExperts):
                found[path] = site.experts
            elif isinstance(site.experts, MlpLoraExperts):
                found |= {f"{path}.{name}": getattr(site.experts, name) for name in LINEARS[4:]}
        return found

    def statics(self) -> dict[str, LoraExperts]:
        """Ordinary LoRA beside the experts, by the path of its linear."""
        return {path: site.static for path, site in self.sites.items() if site.static is not None}

    def unjoined_up_factors(self) -> Iterator[nn.Parameter]:
        """Up factors of experts that are not LoRA on a linear, for strategies that lay them out anew."""
        for site in self.sites.values():
            if isinstance(site.experts, BottleneckExperts):
                yield site.experts.up
            elif isinstance(site.experts, MlpLoraExperts):
                yield site.experts.down_proj.lora_B

    def routers(self) -> dict[str, Router]:
        """Every router by the path of what it serves; of token routing `token`, or `token.B` from block B on."""
        if self.token_routers:
            return self.token_routers
        return {path: site.router for path, site in self.sites.items() if site.router is not None}

    def to_dtype(self, dtype: torch.dtype) -> Adapter:
        """Experts in the backbone's dtype for inference; routers stay in fp32."""
        for module in self.modules():
            if not isinstance(module, Router):
                module.to(dtype)
        return self

    def install(self, strategy: Strategy | None = None) -> None:
        """Put the modules in: to decode with `strategy` (static LoRA merged once), or without one for training.

        A fresh strategy is prepared; one that is prepared already is used as it lies, at the same addresses.
        """
        assert not self.installed, "adapter is installed already"
        self.model.requires_grad_(False)
        if strategy is not None:
            self.projections = join(self.model)
        for site in self.sites.values():
            site.train(self.model.training)
        self._place(self.sites)
        self._undo.callback(self._place, ())
        self._watch_router_input()
        if strategy is None:
            self.watch_backward()
        self.installed = True
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained() if strategy is None else []:
            parameter.requires_grad_(True)
        if strategy is not None:
            self._merge_static()
            if not strategy.prepared:
                strategy.prepare(self)
            strategy.enter()
            self.context.use(strategy)
            # plain LoRA has one selection, which serves any batch
            per_token = strategy.merging and self.method.routing is not Routing.none
            shares = bool(self.token_routers)
            self.host = Host(
                self.model, self.decoding, self.parameters(), per_token, follows(self.method), shares
            )
            self.host.open()
            self._undo.callback(self.host.close)

    def remove(self) -> None:
        """Take the modules out and give the weights back as `install` found them."""
        self.context.decode.restore()
        self._undo.close()
        self.context.use(UnmergedDense())
        self.host = None
        self.context.gates, self.context.said = None, []
        self.installed = False

    @contextmanager
    def installing(self, strategy: Strategy | None = None) -> Iterator[None]:
        """`install`, and `remove` at the end whatever happens inside."""
        self.install(strategy)
        try:
            yield
        finally:
            self.remove()

    def _watch_router_input(self) -> None:
        """Token routing from elsewhere than a linear's input: decide as soon as what it reads is there."""
        router, point = self.token_router, self.method.router_input
        if router is None or point is RouterInput.first_linear:
            return
        # a child of the model, so that optimisers and DDP find it
        self.model.add_module("token_router", router)
        self._undo.callback(delattr, self.model, "token_router")
        if follows(self.method):
            for handle in follow(self.model, self.context, router, point):
                self._undo.callback(handle.remove)
            return
        decide = partial(self._decide_from, router)
        block = watched_block(self.method)
        if block is None:
            # not the embedding's output: a model is given inputs_embeds too, and another embedding when it is resized
            handle = blocks_of(self.model)[0].register_forward_pre_hook(decide)
        else:
            handle = blocks_of(self.model)[block].register_forward_hook(decide)
        self._undo.callback(handle.remove)

    def _decide_from(self, router: Router, block: nn.Module, *seen: Tensor | tuple[Tensor, ...]) -> None:
        """From a block's output or, before there is one, from its input."""
        last = seen[-1]
        self.context.decide(router, last[0] if isinstance(last, tuple) else last)

    def watch_backward(self) -> None:
        """From now on the backward pass of a forward has its gates, or is refused what would be wrong."""
        for block in self.model.get_submodule("model.layers"):
            self._undo.callback(block.register_forward_hook(self._keep_gates).remove)

    def _keep_gates(self, block: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        """A block that is computed again in the backward pass takes the gates that it had, whatever was decided since:
        by a later block, or in another forward.
        """
        hidden = output[0] if isinstance(output, tuple) else output
        # a compiled block that is not computed again stays whole
        if hidden.requires_grad and (not torch.compiler.is_compiling() or block.gradient_checkpointing):
            self._keep_gates_of(hidden)

    @torch.compiler.disable
    def _keep_gates_of(self, hidden: Tensor) -> None:
        gates = self.context.gates

        def again(gradient: Tensor) -> None:
            if self.host is not None:
                # experts are laid out apart from what would be trained, and static LoRA is in the weights
                raise ValueError(
                    "in service an adapter is not trained: call train() before forward and backward"
                )
            self.context.gates = gates

        hidden.register_hook(again)

    def _merge_static(self) -> None:
        """Static LoRA does not depend on the token: merging it once is how its authors serve it."""
        for site in self.sites.values():
            if site.static is not None:
                self._undo.callback(self._unmerge_static, site, clean_copy(site.base.weight))
                up_OR = site.static.lora_B[0].detach() * site.static.scaling
                site.base.weight.data.addmm_(up_OR, site.static.lora_A[0].detach())
                site.static_merged = True

    def _unmerge_static(self, site: AdaptedLinear, clean: Tensor) -> None:
        """Into the weight as it lies now: a strategy may have moved it since."""
        site.base.weight.data.copy_(clean)
        site.static_merged = False

    def _place(self, adapted: Collection[str]) -> None:
        """Put the adapter's module at the paths in `adapted`, and the frozen one at its other paths."""
        for path, site in self.sites.items():
            parent, name = self._parents[path]
            setattr(parent, name, site if path in adapted else site.base)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Decode steps happen inside; afterwards the weights are those of `install` again.

        A strategy that writes all weights ahead of the token then runs the plain backbone: of the adapter only the
        linear whose input decides the gates stays in. One that joins projections runs those instead of its linears.
        """
        strategy, self.context.decoding = self.context.decode, True
        if strategy.ahead:
            self._place([path for path, site in self.sites.items() if site.decides is not None])
        if self.method.routing is Routing.none:
            # plain LoRA has one selection for ever: a merging strategy merges once, here
            strategy.decide(ungated(1, self.device))
        try:
            with placed(strategy.joints):
                yield
        finally:
            self.context.decoding = False
            if self.restores:
                strategy.restore()
            else:
                strategy.decide(self._no_experts())
            if strategy.ahead:
                self._place(self.sites)

    def _no_experts(self) -> Gates:
        """The gates of a token that is left to the backbone: a switch to them takes the last selection out."""
        count = self.geometry.count
        none_TK = torch.zeros(1, min(self.geometry.top_k, count), device=self.device)
        return Gates(none_TK.long(), none_TK, torch.zeros(1, count, device=self.device))

    @contextmanager
    def collecting(self) -> Iterator[list[tuple[Router, Gates]]]:
        """Whatever routers say inside, in the order in which they say it."""
        said: list[tuple[Router, Gates]] = []
        self.context.collect, self.context.said = True, said
        try:
            yield said
        finally:
            self.context.collect, self.context.said = False, []

    def by_name(self, said: list[tuple[Router, Gates]], rows: int) -> dict[str, Tensor]:
        """The choices [B, S, K] of one forward of `rows` sequences, by the router's name; -1 is no expert. Those of a
        draft stand beside.
        """
        names = {id(router): name for name, router in self.routers().items()}
        found = {names[id(router)]: gates for router, gates in said}
        found |= {name + DRAFT: gates.draft for name, gates in found.items() if gates.draft is not None}
        return {name: gates.chosen().unflatten(0, (rows, -1)) for name, gates in found.items()}


def randomise(adapter: Adapter, seed: int, scale: float = 0.02) -> None:
    """Seeded noise in every parameter that starts at zero: where speed alone is measured, untrained experts must do
    something all the same.
    """
    generator = torch.Generator(adapter.device).manual_seed(seed)
    for parameter in adapter.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device) * scale
            parameter.data.copy_(noise)
