"""Which modules a method puts where: the sites of an adapter, with fresh parameters.

In: a Llama-family model, a `Method`, the expert geometry, the shared `Context`. Out: a module for every path that is
adapted, in the order in which they run; the model itself is not changed. Next: adapter.py, which installs them.
"""

from __future__ import annotations

from itertools import product

from torch import nn

from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.adapters.geometry import decision_blocks, expert_count, expert_targets
from adafuse.adapters.layers import AdaptedLinear, Context, MixtureMlp, SerialMlp, Site
from adafuse.adapters.router import Router
from adafuse.config import LINEARS, ExpertKind, Experts, Method, RouterInput, Routing
from adafuse.model.llama import blocks_of, linear_path, mlp_path
from adafuse.model.projections import SHARED_INPUT


def build_sites(model: nn.Module, method: Method, geometry: Experts, context: Context) -> dict[str, Site]:
    """Adapted modules by path. Raises ValueError for a model that is not built like Llama, or a quantised linear."""
    sites: dict[str, Site] = {}
    depth = len(blocks_of(model))
    for block in range(depth):
        count = expert_count(method, geometry, block, depth)
        targets = expert_targets(method, geometry, block)
        for name in LINEARS:
            if name in targets or name in method.static_targets:
                path = linear_path(block, name)
                experts = count if name in targets else 0
                sites[path] = _linear(_plain(model, path), method, geometry, context, experts, name)
        for names in SHARED_INPUT:
            linears = [sites.get(linear_path(block, name)) for name in names]
            routers = [site.router for site in linears if site is not None and site.router is not None]
            for site in linears:
                if isinstance(site, AdaptedLinear):
                    site.beside = routers
        if method.routing is Routing.blockwise:
            mlp = model.get_submodule(mlp_path(block))
            sites[mlp_path(block)] = _mlp(mlp, method, geometry, context, count)
    return sites


def build_token_routers(
    model: nn.Module, method: Method, geometry: Experts, sites: dict[str, Site]
) -> dict[str, Router]:
    """The routers of token routing by name, `token` if it is one; where one reads the input of an adapted linear, that
    linear gets it (`decides`). Every linear with experts learns who decides for it.
    """
    found: dict[str, Router] = {}
    if method.routing is not Routing.token:
        return found
    depth = len(blocks_of(model))
    if method.router_block >= depth:
        raise ValueError(
            f"router_block={method.router_block}: the backbone has {depth} blocks, numbered from 0"
        )
    starts = decision_blocks(method, geometry, depth)
    knobs = geometry.count, geometry.top_k, method.normalisation, method.null_expert, method.router_norm
    if method.router_input is not RouterInput.first_linear:
        found["token"] = Router(model.get_input_embeddings().embedding_dim, *knobs)
    for block, name in product(range(depth), LINEARS):
        site = sites.get(linear_path(block, name))
        if not isinstance(site, AdaptedLinear) or site.experts is None:
            continue
        key = "token" if len(starts) == 1 else f"token.{block}"
        if block in starts and key not in found:
            site.decides = found[key] = Router(site.base.in_features, *knobs)
        site.decided_by = next(reversed(found.values()))
    return found


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
        site.experts = LoraExperts(*widths, count, *_rank_and_alpha(method, geometry))
        site.gated = method.routing is not Routing.none
        if method.routing is Routing.layerwise:
            site.router = Router(base.in_features, count, geometry.top_k, method.normalisation)
    if name in method.static_targets:
        site.static = LoraExperts(*widths, 1, method.static_rank, method.static_alpha)
    return site


def _mlp(mlp: nn.Module, method: Method, geometry: Experts, context: Context, count: int) -> Site:
    router = Router(mlp.gate_proj.in_features, count, geometry.top_k, method.normalisation)
    if method.expert_kind is ExpertKind.bottleneck:
        serial = BottleneckExperts(mlp.down_proj.out_features, method.bottleneck_dim, count)
        return SerialMlp(mlp, serial, router, context, method.dropout)
    mixture = MlpLoraExperts(mlp, count, *_rank_and_alpha(method, geometry), method.dropout)
    return MixtureMlp(mlp, mixture, router, context)


def _rank_and_alpha(method: Method, geometry: Experts) -> tuple[int, float]:
    return method.rank or geometry.rank, method.alpha or geometry.alpha
