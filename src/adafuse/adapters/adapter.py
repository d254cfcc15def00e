"""One method's adapter on one backbone: built once, installed and removed as often as arms change.

In: a Llama-family model of transformers, a `Method`, the expert geometry. Out: an `Adapter`; while installed, the
model's own forward is the adapted one, for training, evaluation and timing alike.
Next: reference.py, the same meaning written slowly, and store.py, its files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.adapters.layers import AdaptedLinear, Context, MixtureMlp, SerialMlp
from adafuse.adapters.router import Router, balance_loss, ungated
from adafuse.config import (
    LINEARS,
    ExpertKind,
    Experts,
    Method,
    RouterInput,
    Routing,
    StrategyName,
)
from adafuse.engine import strategies


class Adapter:
    """Owns the modules it puts into the model; `install` and `remove` leave the backbone's weights as they were."""

    def __init__(self, model: nn.Module, method: Method, geometry: Experts, seed: int) -> None:
        self.model, self.method, self.geometry = model, method, geometry
        dense = strategies.make(StrategyName.dense)
        self.context = Context(decode=dense, whole=dense)
        self.sites: dict[str, nn.Module] = {}
        self.token_router: Router | None = None
        self.installed = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._clean_static: list[tuple[AdaptedLinear, Tensor]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build()

    def _build(self) -> None:
        blocks = blocks_of(self.model)
        for i in range(len(blocks)):
            for name in LINEARS:
                self._build_linear(i, linear_path(i, name), name)
            if self.method.routing is Routing.blockwise:
                self._build_mlp(i, mlp_path(i))
        if self.method.routing is Routing.token:
            width = self.model.get_input_embeddings().embedding_dim
            first = next((s for s in self.linears() if s.experts is not None), None)
            if self.method.router_input is RouterInput.first_linear and first is not None:
                width = first.base.in_features
            self.token_router = self._router(width, self.geometry.count)
            if self.method.router_input is RouterInput.first_linear and first is not None:
                first.decides = self.token_router
        device = next(self.model.parameters()).device
        for module in self.modules():
            module.to(device)

    def _build_linear(self, block: int, path: str, name: str) -> None:
        method, count = self.method, self.count(block)
        has_experts = method.expert_kind is ExpertKind.lora and name in self.expert_targets(block)
        has_static = name in method.static_targets
        if not has_experts and not has_static:
            return
        base = self.model.get_submodule(path)
        if type(base) is not nn.Linear:
            raise ValueError(
                f"{path} is a {type(base).__name__}; experts need a plain nn.Linear (no quantisation)"
            )
        site = AdaptedLinear(base, self.context, method.dropout)
        if has_experts:
            rank, alpha = method.rank or self.geometry.rank, method.alpha or self.geometry.alpha
            site.experts = LoraExperts(base.in_features, base.out_features, count, rank, alpha)
            site.gated = method.routing is not Routing.none
            if method.routing is Routing.layerwise:
                site.router = self._router(base.in_features, count)
        if has_static:
            site.static = LoraExperts(
                base.in_features, base.out_features, 1, method.static_rank, method.static_alpha
            )
        self.sites[path] = site

    def _build_mlp(self, block: int, path: str) -> None:
        mlp, method, count = self.model.get_submodule(path), self.method, self.count(block)
        router = self._router(mlp.gate_proj.in_features, count)
        if method.expert_kind is ExpertKind.bottleneck:
            experts = BottleneckExperts(mlp.down_proj.out_features, method.bottleneck_dim, count)
            self.sites[path] = SerialMlp(mlp, experts, router, self.context, method.dropout)
        else:
            rank, alpha = self.geometry.rank, self.geometry.alpha
            mixture = MlpLoraExperts(mlp, count, rank, alpha, method.dropout)
            self.sites[path] = MixtureMlp(mlp, mixture, router, self.context)

    def _router(self, width: int, count: int) -> Router:
        return Router(width, count, self.geometry.top_k, self.method.normalisation)

    def count(self, block: int) -> int:
        """Number of experts of this block."""
        if self.method.experts_by_quarter is not None:
            return self.method.experts_by_quarter[block * 4 // len(blocks_of(self.model))]
        return self.method.count or self.geometry.count

    def expert_targets(self, block: int) -> list[str]:
        """Linears with experts in this block; none in block 0 when its own output decides the gates."""
        if block == 0 and self.method.router_input is RouterInput.block0_output:
            return []
        return self.geometry.targets if self.method.expert_targets is None else self.method.expert_targets

    def linears(self) -> list[AdaptedLinear]:
        """Adapted linears in the order in which they run."""
        return [site for site in self.sites.values() if isinstance(site, AdaptedLinear)]

    def modules(self) -> Iterator[nn.Module]:
        """The adapter's own modules, without the frozen ones they wrap."""
        if self.token_router is not None:
            yield self.token_router
        for site in self.sites.values():
            for name in ("experts", "static", "router"):
                module = getattr(site, name, None)
                if module is not None:
                    yield module

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules() for p in module.parameters()]

    def up_factors(self) -> Iterator[nn.Parameter]:
        """The parameters whose experts are summed over, for strategies that lay them out anew."""
        for site in self.sites.values():
            experts = getattr(site, "experts", None)
            if isinstance(experts, LoraExperts):
                yield experts.lora_B
            elif isinstance(experts, BottleneckExperts):
                yield experts.up
            elif isinstance(experts, MlpLoraExperts):
                yield experts.down_proj.lora_B

    def routers(self) -> dict[str, Router]:
        """Every router by the path of what it serves; the token router is called `token`."""
        found = {path: s.router for path, s in self.sites.items() if getattr(s, "router", None) is not None}
        return {"token": self.token_router} if self.token_router is not None else found

    def to_dtype(self, dtype: torch.dtype) -> Adapter:
        """Experts in the backbone's dtype for inference; routers stay in fp32."""
        for module in self.modules():
            if not isinstance(module, Router):
                module.to(dtype)
        return self

    def install(self, strategy: StrategyName | None = None) -> None:
        """Put the modules in. With a strategy: ready to decode (static LoRA merged once). Without: for training."""
        assert not self.installed, "adapter is installed already"
        self.model.requires_grad_(False)
        for path, site in self.sites.items():
            parent, _, name = path.rpartition(".")
            site.train(self.model.training)
            setattr(self.model.get_submodule(parent), name, site)
        self._hook = self._watch_router_input()
        self.installed = True
        for parameter in self.parameters():
            parameter.requires_grad_(strategy is None)
        if strategy is not None:
            self._merge_static()
            self.context.decode = strategies.make(strategy)
            self.context.decode.prepare(self)
            loop = strategy is StrategyName.loop
            self.context.whole = self.context.decode if loop else strategies.make(StrategyName.dense)

    def remove(self) -> None:
        """Take the modules out and give the weights back as `install` found them."""
        self.context.decode.restore()
        for site, clean in self._clean_static:
            site.base.weight.data.copy_(clean)
            site.static_merged = False
        self._clean_static = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if "token_router" in self.model._modules:
            del self.model.token_router
        for path, site in reversed(self.sites.items()):
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, site.base)
        dense = strategies.make(StrategyName.dense)
        self.context.decode = self.context.whole = dense
        self.context.gates, self.context.said = None, []
        self.installed = False

    def _watch_router_input(self) -> torch.utils.hooks.RemovableHandle | None:
        """Token routing from the embedding or from block 0's output: decide as soon as it is there."""
        router, point = self.token_router, self.method.router_input
        if router is None or point is RouterInput.first_linear:
            return None
        # a child of the model, so that optimisers and DDP find it
        self.model.add_module("token_router", router)
        embedding = point is RouterInput.embedding
        watched = self.model.get_input_embeddings() if embedding else blocks_of(self.model)[0]

        def decide(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.context.decide(router, output[0] if isinstance(output, tuple) else output)

        return watched.register_forward_hook(decide)

    def _merge_static(self) -> None:
        """Static LoRA does not depend on the token: merging it once is how its authors serve it."""
        for site in self.linears():
            if site.static is not None:
                weight = site.base.weight.data
                self._clean_static.append((site, weight.clone()))
                weight.addmm_(
                    site.static.lora_B[0].detach() * site.static.scaling, site.static.lora_A[0].detach()
                )
                site.static_merged = True

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Decode steps happen inside; afterwards the weights are those of `install` again."""
        self.context.decoding = True
        if self.method.routing is Routing.none:
            # plain LoRA has one selection for ever: a merging strategy merges once, here
            device = next(self.model.parameters()).device
            self.context.decode.decide(ungated(1, device))
        try:
            yield
        finally:
            self.context.decoding = False
            self.context.decode.restore()

    def balance_loss(self, keep: Tensor) -> Tensor:
        """Mean over routers of the last forward's balance loss; `keep` [B, S] is true where a token counts."""
        losses = [balance_loss(gates, keep.reshape(-1)) for _, gates in self.context.said]
        self.context.said = []
        return torch.stack(losses).mean() if losses else torch.zeros((), device=keep.device)

    @property
    def merging(self) -> bool:
        return self.context.decode.merging


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks. Raises ValueError for a model that is not built like Llama."""
    try:
        blocks = model.get_submodule("model.layers")
        for name in LINEARS:
            model.get_submodule(linear_path(0, name))
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} is not built like Llama ({error}): use a Llama, Mistral, Qwen2 or Qwen3 checkpoint"
        ) from None
    return blocks


def linear_path(block: int, name: str) -> str:
    part = "self_attn" if name in LINEARS[:4] else "mlp"
    return f"model.layers.{block}.{part}.{name}"


def mlp_path(block: int) -> str:
    return f"model.layers.{block}.mlp"


def randomise(adapter: Adapter, seed: int, scale: float = 0.02) -> None:
    """Seeded values for factors that start at zero, so that untrained experts do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(noise.to(parameter.dtype))
