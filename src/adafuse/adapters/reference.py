"""The oracle: every method's forward in fp32, written from the equations and sharing no arithmetic with layers.py.

In: a model without installed modules, an `Adapter` (its numbers only), ids [B, S]. Out: logits [B, S, V] in fp32. It
hooks a view of the backbone in fp32 and adds one expert after the other, weighted by `Reference._gates`. Slow on
purpose; no strategy is timed before it agrees with this. Next: store.py.

The choice of experts is discontinuous: rounding may turn a near-tie over, and then both answers are right. So an arm's
own choices can be given, and `regret` says by how much the worst of them misses the reference's top-k.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import LoraExperts
from adafuse.adapters.geometry import follows, watched_block
from adafuse.adapters.layers import AdaptedLinear, MixtureMlp, SerialMlp
from adafuse.adapters.router import DRAFT, NORM_EPS, Router
from adafuse.config import Normalisation, RouterInput
from adafuse.model.llama import blocks_of


def float_view(model: nn.Module) -> nn.Module:
    """The plain backbone computing in fp32 from the weights of `model` themselves, each widened when it is used.

    A float copy of 7 billion weights takes 27 GB, for which a device of 80 GB has no room beside what is checked; so
    the weights must be clean whenever this is called.
    """
    view = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
    for module in view.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_float_linear, module)
        elif isinstance(module, nn.Embedding):
            module.forward = partial(_float_embedding, module)
    return view


def _float_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(x, linear.weight.float(), bias)


def _float_embedding(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, embedding.weight, embedding.padding_idx).float()


class Reference:
    """Logits of `oracle`, the backbone in fp32 (`float_view`), with `adapter`; the backbone itself is never changed.

    Its hooks stay on the view until `close`.
    """

    def __init__(self, oracle: nn.Module, adapter: Adapter | None) -> None:
        self._oracle = oracle
        # of the last call: the largest router logit missed, by which router, and the largest router logit
        self.regret, self.missed_by, self.router_scale = 0.0, "", 0.0
        self._choices: dict[str, Tensor] = {}
        # token routing: the gates [..., E] of these tokens, for all layers
        self._shared_E = torch.empty(0)
        # a router that reads the state of the token before: of these tokens [B, S, D] that, and their own
        self._before, self._states = torch.empty(0), torch.empty(0)
        self._follows = adapter is not None and follows(adapter.method)
        # the hooks say nothing; which of the given choices are of these tokens, and of this pass
        self._silent, self._span, self._pass = False, slice(None), ""
        self._names = {id(router): name for name, router in adapter.routers().items()} if adapter else {}
        self._handles = self._hook(adapter) if adapter else []

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, choices: dict[str, Tensor] | None = None, prompt: int | None = None
    ) -> Tensor:
        """Logits [B, S, V]; `choices` holds [B, S, K] expert numbers by the router's name (`Adapter.by_name`). The
        first `prompt` tokens (None: all) came together, the others one by one: some routers ask.
        """
        self._choices = choices or {}
        self.regret, self.missed_by, self.router_scale = 0.0, "", 0.0
        if self._follows:
            return self._one_by_one(input_ids, input_ids.shape[1] if prompt is None else prompt)
        return self._oracle(input_ids, use_cache=False).logits

    def _one_by_one(self, ids_BS: Tensor, prompt: int) -> Tensor:
        """The prompt's gates are from the states of a draft, whose own gates are from those of the plain backbone; the
        gates of every other token are from the state that the token before it has just ended as.
        """
        self._span = slice(prompt)
        for self._silent, self._pass in ((True, ""), (False, DRAFT)):
            self._oracle(ids_BS[:, :prompt], use_cache=False)
            self._before = self._states.roll(1, dims=1)
            self._before[:, 0] = 1
        self._pass = ""
        cache, logits = DynamicCache(), []
        for start, end in pairwise((0, *range(prompt, ids_BS.shape[1] + 1))):
            self._span = slice(start, end)
            logits.append(self._oracle(ids_BS[:, start:end], past_key_values=cache, use_cache=True).logits)
            self._before = self._states[:, -1:]
        return torch.cat(logits, dim=1)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, adapter: Adapter) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        token, point = adapter.token_router, adapter.method.router_input
        if token is not None and self._follows:
            embedding, norm = self._oracle.get_input_embeddings(), self._oracle.get_submodule("model.norm")
            read = partial(self._share_before, token, point is RouterInput.previous_and_embedding)
            handles += [embedding.register_forward_hook(read), norm.register_forward_hook(self._note)]
        elif token is not None and point is not RouterInput.first_linear:
            block = watched_block(adapter.method)
            watched = self._oracle.get_input_embeddings() if block is None else blocks_of(self._oracle)[block]
            handles.append(watched.register_forward_hook(partial(self._share, token)))
        forms = {AdaptedLinear: self._linear, SerialMlp: self._serial, MixtureMlp: self._mixture}
        for path, site in adapter.sites.items():
            module = self._oracle.get_submodule(path)
            if site.decides is not None:
                handles.append(module.register_forward_pre_hook(partial(self._share, site.decides)))
            handles.append(module.register_forward_hook(partial(forms[type(site)], site)))
        return handles

    def _share(self, router: Router, module: nn.Module, *seen: Tensor | tuple[Tensor, ...]) -> None:
        """Decide for all layers, from a module's output or, before there is one, from its input."""
        last = seen[-1]
        self._shared_E = self._gates(router, last[0] if isinstance(last, tuple) else last)

    def _share_before(
        self, router: Router, beside: bool, module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor
    ) -> None:
        """Decide from the states before these tokens, or from x = state / rms(state) + embedding / rms(embedding)."""
        if not self._silent:
            x = _normed(self._before) + _normed(embedded) if beside else self._before
            self._shared_E = self._gates(router, x)

    def _note(self, norm: nn.Module, inputs: tuple[Tensor, ...], states: Tensor) -> None:
        self._states = states

    def _linear(
        self, site: AdaptedLinear, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
    ) -> Tensor:
        """y = W x + s * sum_e g_e B_e (A_e x), and the same with g = 1 for a static LoRA."""
        x = inputs[0]
        if self._silent:
            return y
        if site.experts is not None:
            if not site.gated:
                gates_E = torch.ones(*x.shape[:-1], 1)
            else:
                gates_E = self._shared_E if site.router is None else self._gates(site.router, x)
            for e in range(site.experts.count):
                y = y + gates_E[..., e, None].to(x.device) * _lora(site.experts, e, x)
        if site.static is not None:
            y = y + _lora(site.static, 0, x)
        return y

    def _serial(self, site: SerialMlp, mlp: nn.Module, inputs: tuple[Tensor, ...], u: Tensor) -> Tensor:
        """y = u + sum_e g_e U_e gelu(D_e u), u = MLP(x), g = g(x)  (PESC)."""
        experts, gates_E, y = site.experts, self._gates(site.router, inputs[0]), u
        for e in range(experts.count):
            inner = F.gelu(u @ experts.down[e].float().T)
            y = y + gates_E[..., e, None] * (inner @ experts.up[e].float().T)
        return y

    def _mixture(
        self, site: MixtureMlp, mlp: nn.Module, inputs: tuple[Tensor, ...], unused: Tensor
    ) -> Tensor:
        """y = sum_e g_e MLP_e(x), MLP_e the frozen MLP with expert e's LoRA on its three linears  (MixLoRA)."""
        experts, x = site.experts, inputs[0]
        gates_E, y = self._gates(site.router, x), torch.zeros_like(unused)
        for e in range(experts.count):
            gate = mlp.gate_proj(x) + _lora(experts.gate_proj, e, x)
            up = mlp.up_proj(x) + _lora(experts.up_proj, e, x)
            inner = mlp.act_fn(gate) * up
            y = y + gates_E[..., e, None] * (mlp.down_proj(inner) + _lora(experts.down_proj, e, inner))
        return y

    def _gates(self, router: Router, x: Tensor) -> Tensor:
        """Gates [..., E], zero for experts outside the top k (or outside the choices that were given)."""
        x = x.float()
        if router.norm:
            x = _normed(x)
        logits = x @ router.weight.float().T
        null, given = None, self._choices.get(self._names[id(router)] + self._pass)
        given = None if given is None else given[:, self._span]
        if router.null_expert:
            null, logits = logits[..., -1:], logits[..., :-1]
        kth = logits.topk(router.top_k, dim=-1).values[..., -1:]
        kept, alone = logits >= kth, torch.zeros_like(kth, dtype=torch.bool)
        if null is not None:
            alone = self._alone(router, null - logits.max(-1, keepdim=True).values, given)
        if given is not None:
            given = given.clamp(min=0)
            kept = torch.zeros_like(kept).scatter(-1, given, True)
            worst = logits.gather(-1, given).min(-1, keepdim=True).values
            self._miss(router, torch.where(alone, 0.0, kth - worst))
        kept = kept & ~alone
        self.router_scale = max(self.router_scale, float(logits.abs().max()))
        if router.normalisation is Normalisation.softmax_topk_raw:
            return torch.where(kept, torch.softmax(logits, -1), 0.0)
        # softmax over all, top-k, divide by the sum  ==  softmax over the top-k
        gates = torch.softmax(torch.where(kept | alone, logits, -torch.inf), -1)
        return torch.where(alone, 0.0, gates)

    def _alone(self, router: Router, lead: Tensor, given: Tensor | None) -> Tensor:
        """Which tokens [..., 1] the backbone has for itself: where the null expert's logit leads, or as was given."""
        own = lead > 0
        if given is None:
            return own
        alone = given[..., :1] < 0
        self._miss(router, torch.where(alone != own, lead.abs(), 0.0))
        return alone

    def _miss(self, router: Router, logits: Tensor) -> None:
        worst = float(logits.max())
        if worst > self.regret:
            self.regret, self.missed_by = worst, self._names[id(router)] + self._pass


def delta(lora: LoraExperts, experts: Sequence[int], gates: Sequence[float]) -> Tensor:
    """s * sum_e g_e B_e A_e, [O, I] in fp32: what these experts add to a weight that they are merged into."""
    chosen = zip(experts, gates, strict=True)
    factors = ((gate, lora.lora_B[e].detach().float(), lora.lora_A[e].detach().float()) for e, gate in chosen)
    return lora.alpha / lora.rank * torch.stack([gate * (up @ down) for gate, up, down in factors]).sum(0)


def _lora(lora: LoraExperts, e: int, x: Tensor) -> Tensor:
    return (x @ lora.lora_A[e].float().T) @ lora.lora_B[e].float().T * (lora.alpha / lora.lora_A.shape[1])


def _normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
