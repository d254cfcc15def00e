"""PEFT's own modules on the same backbone, launched as its users do: what our forms are held against.

`peft`: one LoRA, unmerged, prompt and decoded tokens alike. `peft_merge`: for every token, `merge_adapter` writes the
chosen experts into the weights as soon as the gates are known, the token runs, `unmerge_adapter` takes them out. PEFT
knows no gate per token, so there the prompt goes through our own modules. In: an `Adapter`'s numbers, shared, not
copied. Out: a decoder as decoders.py says; afterwards no module of PEFT is left, and the weights are the clean ones.
Next: graph.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates, Router
from adafuse.adapters.store import expert_name
from adafuse.config import StrategyName
from adafuse.engine.decode import decode_one_token, decoding, launched
from adafuse.engine.decoders import Eager
from adafuse.model.projections import join
from adafuse.strategies.merge import SimpleMerge


class Peft(Eager):
    """transformers' own loop over a `PeftModel`, which wraps the backbone while the decoder is installed.

    PEFT's modules are made once: naming 8 adapters on 224 linears takes it seconds.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, strategy: StrategyName) -> None:
        super().__init__(model, adapter, strategy)
        self._own = adapter
        self._peft: PeftModel | None = None
        self._layers: dict[str, LoraLayer] = {}
        self._merge: PeftMerge | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        # before the linears are wrapped: whoever joins them later would take PEFT's modules for plain ones
        join(self.model)
        if self._peft is None:
            self._peft = inject(self.model, self._own)
            self._layers = {path: self.model.get_submodule(path) for path in self._own.adapted()}
        prompt = self._ours_for_the_prompt() if self.strategy is StrategyName.peft_merge else nullcontext()
        with _within(self.model, self._peft, self._layers), prompt:
            yield

    @contextmanager
    def _ours_for_the_prompt(self) -> Iterator[None]:
        """Our modules where PEFT's were, until decoding begins; the clean weights are copied first."""
        self._merge = PeftMerge(self._peft, list(self._layers.values()))
        try:
            with self._own.installing(self._merge):
                yield
        finally:
            self._merge = None

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """PEFT's modules in our place. The gates are decided where our own arms decide them, within the token's
        forward and before any adapted linear runs: no embedding or norm is computed twice.
        """
        if self._merge is None:
            yield
            return
        # at its end the weights are restored, and our modules stand in the model again
        with decoding(self._own), ExitStack() as stack:
            _put(self.model, self._layers)
            for path, site in self._own.adapted().items():
                if site.decides is not None:
                    decide = partial(self._decide, site.decides)
                    handle = self._layers[path].register_forward_pre_hook(decide)
                    stack.callback(handle.remove)
            yield

    def run(self, count: int) -> Tensor:
        """Unpadded prompts only."""
        ids = []
        for _ in range(count):
            self._token = self._one_token(self._token).argmax(-1, keepdim=True)
            ids.append(self._token)
        return torch.cat(ids, dim=1)

    def _one_token(self, token_B1: Tensor) -> Tensor:
        launched(self._own, 1)
        logits_BV = decode_one_token(self._peft, token_B1, self._mask, self._cache)
        if self._merge is not None:
            self._merge.take_out()
        return logits_BV

    def _decide(self, router: Router, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._own.context.decide(router, inputs[0])


class PeftMerge(SimpleMerge):
    """What is done when a token's gates are known, and after it. The linears that run are PEFT's, never its own.

    `unmerge_adapter` subtracts what `merge_adapter` added, which in bf16 leaves roundings behind; they stay in the
    weights from token to token, as they do for PEFT's users, until `restore` copies the clean weights back in place.
    """

    ahead = True

    def __init__(self, peft: PeftModel, layers: list[LoraLayer]) -> None:
        super().__init__()
        self._peft, self._layers = peft, layers

    def _prepare(self, adapter: Adapter) -> None:
        """Nothing: PEFT multiplies the factors anew for every merge."""

    def decide(self, gates: Gates) -> None:
        """The host waits for the ids: PEFT takes names. Its public means for a gate is the scale of a layer."""
        if gates.index_TK.shape[0] > 1:
            raise ValueError("strategy peft_merge merges one selection for the whole batch: use batch=1")
        names = [expert_name(expert) for expert in gates.index_TK[0].tolist()]
        for name, gate in zip(names, gates.weight_TK[0].tolist(), strict=True):
            for layer in self._layers:
                layer.set_scale(name, gate)
        self._peft.merge_adapter(adapter_names=names)

    def take_out(self) -> None:
        self._peft.unmerge_adapter()

    def restore(self) -> None:
        """Also after a token that broke off between merge and unmerge."""
        if any(layer.merged for layer in self._layers):
            self.take_out()
        super().restore()

    def _clear(self) -> None:
        """Nothing: PEFT's layers know what they hold."""


def trainable(
    model: nn.Module, adapter: Adapter
) -> tuple[Callable[[], AbstractContextManager[None]], list[nn.Parameter]]:
    """PEFT's LoRA to be trained, from the numbers of a plain LoRA: how it comes into the model, its parameters."""
    peft = inject(model, adapter, trained=True)
    layers = {path: model.get_submodule(path) for path in adapter.adapted()}
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    peft.unload()
    return partial(_within, model, peft, layers), parameters


@contextmanager
def _within(model: nn.Module, peft: PeftModel, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    _put(model, layers)
    try:
        yield
    finally:
        _put(model, layers)
        peft.unload()


def inject(model: nn.Module, adapter: Adapter, *, trained: bool = False) -> PeftModel:
    """PEFT's LoRA modules in `model`, an adapter per expert, whose factors are the numbers of ours in the same memory.

    Built empty, then given our factors: nothing is initialised in vain. Ours have the backbone's dtype, and so they
    stay; by default (autocast_adapter_dtype=True) PEFT would hold bf16 experts in fp32, and cast every input up. To be
    `trained` they have ours in fp32, and the method's dropout.
    """
    sites = adapter.adapted()
    first = next(iter(sites.values())).lora
    peft: PeftModel | None = None
    for expert in range(first.count):
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.alpha,
            lora_dropout=adapter.method.dropout if trained else 0.0,
            target_modules=list(sites),
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=not trained,
        )
        name, plainly = expert_name(expert), {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name, **plainly)
        else:
            peft.add_adapter(name, config, **plainly)
    for path, site in sites.items():
        layer = model.get_submodule(path)
        layer.train(trained or model.training)
        for expert in range(first.count):
            name, lora = expert_name(expert), site.lora
            layer.lora_A[name].weight = nn.Parameter(lora.lora_A[expert].detach(), requires_grad=trained)
            layer.lora_B[name].weight = nn.Parameter(lora.lora_B[expert].detach(), requires_grad=trained)
    return peft


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
