"""The oracle: every method's forward in fp32, written from the equations and sharing no code with layers.py.

In: a model without installed modules, an `Adapter` (its numbers only), ids [B, S], mask [B, S]. Out: logits
[B, S, V] in fp32. It hooks a float copy of the backbone and adds one expert after the other, token by token weights
from `_gates`. Slow on purpose; no strategy is timed before it agrees with this. Next: store.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafuse.adapters.adapter import Adapter, blocks_of
from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.adapters.router import Router
from adafuse.config import Normalisation, RouterInput


def build(model: nn.Module, adapter: Adapter | None) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function ids [B, S], mask [B, S] | None -> logits [B, S, V]; the backbone is copied, never changed."""
    assert adapter is None or not adapter.installed, "the reference starts from the plain backbone"
    oracle = copy.deepcopy(model).float().eval()
    if adapter is not None:
        _Oracle(oracle, adapter).hook()

    @torch.no_grad()
    def logits(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return oracle(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits

    return logits


class _Oracle:
    """The hooks of one adapter on one float copy, and the shared gates between them."""

    def __init__(self, oracle: nn.Module, adapter: Adapter) -> None:
        self.oracle, self.adapter = oracle, adapter
        self.shared_TE = torch.empty(0)

    def hook(self) -> None:
        adapter, token = self.adapter, self.adapter.token_router
        if token is not None and adapter.method.router_input is RouterInput.embedding:
            self.oracle.get_input_embeddings().register_forward_hook(self._share(token))
        if token is not None and adapter.method.router_input is RouterInput.block0_output:
            blocks_of(self.oracle)[0].register_forward_hook(self._share(token))
        for path, site in adapter.sites.items():
            module = self.oracle.get_submodule(path)
            if isinstance(site.experts, BottleneckExperts):
                module.register_forward_hook(self._serial(site.experts, site.router))
            elif isinstance(site.experts, MlpLoraExperts):
                module.register_forward_hook(self._mixture(site.experts, site.router))
            else:
                if site.experts is not None and getattr(site, "decides", None) is not None:
                    module.register_forward_pre_hook(self._share_input(site.decides))
                module.register_forward_hook(self._linear(site))

    def _share(self, router: Router) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            self.shared_TE = _gates(router, output[0] if isinstance(output, tuple) else output)

        return hook

    def _share_input(self, router: Router) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.shared_TE = _gates(router, inputs[0])

        return hook

    def _linear(self, site: nn.Module) -> Callable[..., Tensor]:
        """y = W x + s * sum_e g_e B_e (A_e x), and the same with g = 1 for a static LoRA."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = inputs[0]
            if site.experts is not None:
                if not site.gated:
                    gates_E = torch.ones(*x.shape[:-1], 1)
                else:
                    gates_E = self.shared_TE if site.router is None else _gates(site.router, x)
                for e in range(site.experts.count):
                    y = y + gates_E[..., e, None].to(x.device) * _lora(site.experts, e, x)
            if site.static is not None:
                y = y + _lora(site.static, 0, x)
            return y

        return hook

    def _serial(self, experts: BottleneckExperts, router: Router) -> Callable[..., Tensor]:
        """y = u + sum_e g_e U_e gelu(D_e u), u = MLP(x), g = g(x)  (PESC)."""

        def hook(mlp: nn.Module, inputs: tuple[Tensor, ...], u: Tensor) -> Tensor:
            gates_E, y = _gates(router, inputs[0]), u
            for e in range(experts.count):
                inner = F.gelu(u @ experts.down[e].float().T)
                y = y + gates_E[..., e, None] * (inner @ experts.up[e].float().T)
            return y

        return hook

    def _mixture(self, experts: MlpLoraExperts, router: Router) -> Callable[..., Tensor]:
        """y = sum_e g_e MLP_e(x), MLP_e the frozen MLP with expert e's LoRA on its three linears  (MixLoRA)."""

        def hook(mlp: nn.Module, inputs: tuple[Tensor, ...], unused: Tensor) -> Tensor:
            x = inputs[0]
            gates_E, y = _gates(router, x), torch.zeros_like(unused)
            for e in range(experts.count):
                gate = mlp.gate_proj(x) + _lora(experts.gate_proj, e, x)
                up = mlp.up_proj(x) + _lora(experts.up_proj, e, x)
                inner = mlp.act_fn(gate) * up
                y = y + gates_E[..., e, None] * (mlp.down_proj(inner) + _lora(experts.down_proj, e, inner))
            return y

        return hook


def _lora(lora: LoraExperts, e: int, x: Tensor) -> Tensor:
    return (x @ lora.lora_A[e].float().T) @ lora.lora_B[e].float().T * (lora.alpha / lora.lora_A.shape[1])


def _gates(router: Router, x: Tensor) -> Tensor:
    """Gates [..., E], zero for experts outside the top k."""
    logits = x.float() @ router.weight.float().T
    kth = logits.topk(router.top_k, dim=-1).values[..., -1:]
    kept = logits >= kth
    if router.normalisation is Normalisation.softmax_topk_raw:
        return torch.where(kept, torch.softmax(logits, -1), 0.0)
    # softmax over all, top-k, divide by the sum  ==  softmax over the top-k
    return torch.softmax(torch.where(kept, logits, -torch.inf), -1)
