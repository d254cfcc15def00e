"""Which modules a method puts where: the sites of an adapter, with fresh parameters.

In: a Llama-family model, a `Method`, the expert geometry, the shared `Context`. Out: a module for every path that is
adapted, in the order in which they run; the model itself is not changed. Next: adapter.py, which installs them.
"""

from __future__ import annotations

from torch import nn

from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.adapters.geometry import expert_count, expert_targets
from adafuse.adapters.layers import AdaptedLinear, Context, MixtureMlp, SerialMlp
from adafuse.adapters.router import Router
from adafuse.config import LINEARS, ExpertKind, Experts, Method, Routing
from adafuse.model.llama import blocks_of, linear_path, mlp_path


def build_sites(
    model: nn.Module, method: Method, geometry: Experts, context: Context
) -> dict[str, nn.Module]:
    """Adapted modules by path. Raises ValueError for a model that is not built like Llama, or a quantised linear."""
    sites: dict[str, nn.Module] = {}
    depth = len(blocks_of(model))
    for block in range(depth):
        count = expert_count(method, geometry, block, depth)
        for name in LINEARS:
            path = linear_path(block, name)
            has_experts = name in expert_targets(method, geometry, block)
            if has_experts or name in method.static_targets:
                sites[path] = _linear(
                    _plain(model, path), method, geometry, context, count if has_experts else 0, name
                )
        if method.routing is Routing.blockwise:
            sites[mlp_path(block)] = _mlp(
                model.get_submodule(mlp_path(block)), method, geometry, context, count
            )
    return sites


def _plain(model: nn.Module, path: str) -> nn.Linear:
    base = model.get_submodule(path)
    if type(base) is not nn.Linear:
        raise ValueError(
            f"{path} is a {type(base).__name__}; experts need a plain nn.Linear (no quantisation)"
        )
    return base


def _linear(
    base: nn.Linear, method: Method, geometry: Experts, context: Context, count: int, name: str
) -> AdaptedLinear:
    site = AdaptedLinear(base, context, method.dropout)
    widths = base.in_features, base.out_features
    if count:
        site.experts = LoraExperts(
            *widths, count, method.rank or geometry.rank, method.alpha or geometry.alpha
        )
        site.gated = method.routing is not Routing.none
        if method.routing is Routing.layerwise:
            site.router = Router(base.in_features, count, geometry.top_k, method.normalisation)
    if name in method.static_targets:
        site.static = LoraExperts(*widths, 1, method.static_rank, method.static_alpha)
    return site


def _mlp(mlp: nn.Module, method: Method, geometry: Experts, context: Context, count: int) -> nn.Module:
    router = Router(mlp.gate_proj.in_features, count, geometry.top_k, method.normalisation)
    if method.expert_kind is ExpertKind.bottleneck:
        serial = BottleneckExperts(mlp.down_proj.out_features, method.bottleneck_dim, count)
        return SerialMlp(mlp, serial, router, context, method.dropout)
    ranks = method.rank or geometry.rank, method.alpha or geometry.alpha
    mixture = MlpLoraExperts(mlp, count, *ranks, method.dropout)
    return MixtureMlp(mlp, mixture, router, context)
