"""PEFT on our backbone: the same function as the reference, and every gate at its expert."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates
from adafuse.config import Routing, StrategyName
from adafuse.engine import peft
from adafuse.engine.decoders import Decoder
from synthetic.adapters import prompt
from synthetic.peft import (
    ADAFUSE,
    BOTH,
    IN_DTYPES,
    LORA,
    Arm,
    adapted,
    checks_of,
    decode,
    decoder_of,
    layers_of,
)

ARMS = [
    LORA,
    (StrategyName.peft, ["method=lora", "experts.targets=[q_proj,v_proj]"]),
    ADAFUSE,
    (StrategyName.peft_merge, ["method=adafuse", "method.router_input=embedding"]),
    (StrategyName.peft_merge, ["method=adafuse", "method.router_input=block0_output"]),
    (StrategyName.peft_merge, ["method=adafuse", "method.normalisation=softmax_topk_raw"]),
    (StrategyName.peft_merge, ["method=adafuse", "experts.targets=[gate_proj,down_proj]"]),
]


def passes(adapter: Adapter, arm: Arm, ids: torch.Tensor) -> list[str]:
    """Names of the checks, all of them passed."""
    checks = checks_of(adapter, arm, ids)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    return sorted(check.check for check in checks)


@contextmanager
def decoding(decoder: Decoder) -> Iterator[torch.Tensor]:
    """Ready to step; yields the first token."""
    with decoder.installed():
        token = decoder.start(prompt()).argmax(-1, keepdim=True)
        with decoder.decoding():
            yield token


@IN_DTYPES
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm[0].name},{','.join(arm[1])}")
def test_both_arms_pass_every_check(arm: Arm, dtype: torch.dtype, tiny_llama) -> None:
    adapter = adapted(tiny_llama().to(dtype), arm)
    wanted = ["finite", "greedy", "logits", "padding", "restored", "whole"]
    routed = adapter.method.routing is Routing.token
    wanted += [f"routing_{way}" for way in ("logits", "padding", "whole") if routed]
    assert passes(adapter, arm, prompt()) == sorted(wanted)


@pytest.mark.gpu
@IN_DTYPES
@BOTH
def test_both_arms_on_a_gpu(arm: Arm, dtype: torch.dtype, tiny_llama) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256).to("cuda", dtype)
    passes(adapted(model, arm), arm, prompt().cuda())


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_every_backbone_family(model_type: str, tiny_llama) -> None:
    """Qwen2's linears have biases."""
    for arm in (LORA, ADAFUSE):
        passes(adapted(tiny_llama(model_type), arm), arm, prompt())


def test_an_unmerged_lora_serves_a_batch(tiny_llama) -> None:
    passes(adapted(tiny_llama(), LORA), LORA, prompt(rows=2))


@BOTH
def test_the_linears_that_run_are_those_of_peft(arm: Arm, tiny_llama, monkeypatch) -> None:
    """Called through a `PeftModel`, every adapted linear once per token."""
    adapter, ran, called = adapted(tiny_llama(), arm), [], []
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: (ran.append(self), forward(self, x))[1])
    decoder = decoder_of(adapter, arm)
    with decoding(decoder) as token:
        layers = layers_of(adapter.model)
        decoder._peft.register_forward_hook(lambda *_: called.append(1))
        ran.clear()
        decoder.step(token)
    assert set(layers) == set(adapter.sites)
    assert called == [1] and [id(layer) for layer in ran] == [id(layer) for layer in layers.values()]


@IN_DTYPES
@BOTH
def test_experts_keep_their_dtype_their_memory_and_their_scaling(
    arm: Arm, dtype: torch.dtype, tiny_llama
) -> None:
    """PEFT's default would turn bf16 experts into fp32 ones."""
    adapter = adapted(tiny_llama().to(dtype), arm)
    with decoding(decoder_of(adapter, arm)):
        for path, layer in layers_of(adapter.model).items():
            lora = adapter.sites[path].lora
            assert sorted(layer.lora_A) == [f"expert_{e:02d}" for e in range(lora.count)]
            for e, name in enumerate(sorted(layer.lora_A)):
                for factor, ours in ((layer.lora_A, lora.lora_A), (layer.lora_B, lora.lora_B)):
                    assert factor[name].weight.dtype is dtype
                    assert factor[name].weight.data_ptr() == ours[e].data_ptr()
                assert layer.scaling[name] == lora.scaling and not layer.training


def test_gates_and_experts_reach_the_weights(tiny_llama) -> None:
    """After `decide`, each weight is the clean one plus the chosen experts, each times its gate; then clean again."""
    adapter = adapted(tiny_llama(), ADAFUSE)
    gates = Gates(torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.3]]), torch.full((1, 4), 0.25))
    clean = {path: site.base.weight.clone() for path, site in adapter.sites.items()}
    with decoding(decoder_of(adapter, ADAFUSE)):
        adapter.context.decode.decide(gates)
        for path, layer in layers_of(adapter.model).items():
            lora = adapter.sites[path].lora
            delta = 0.7 * lora.lora_B[2] @ lora.lora_A[2] + 0.3 * lora.lora_B[0] @ lora.lora_A[0]
            torch.testing.assert_close(layer.base_layer.weight, clean[path] + lora.scaling * delta)
            assert layer.merged_adapters == ["expert_02", "expert_00"]
        adapter.context.decode.take_out()
        for path, layer in layers_of(adapter.model).items():
            torch.testing.assert_close(layer.base_layer.weight, clean[path])
            assert not layer.merged


def ignore_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraLayer, "set_scale", lambda self, name, gate: None)


def swap_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = peft.PeftMerge.decide
    swapped = lambda gates: Gates((gates.index_TK + 1) % 4, gates.weight_TK, gates.probs_TE)  # noqa: E731
    monkeypatch.setattr(peft.PeftMerge, "decide", lambda self, gates: decide(self, swapped(gates)))


def keep_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights keep what the last token merged."""
    monkeypatch.setattr(Linear, "unmerge", lambda self: self.merged_adapters.clear())


@pytest.mark.parametrize("mutation", [ignore_gates, swap_experts, keep_them_in])
def test_the_checks_catch_a_wrong_merge(mutation, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    checks = {check.check: check for check in checks_of(adapted(tiny_llama(), ADAFUSE), ADAFUSE, prompt())}
    assert not checks["logits"].passed


def test_the_checks_catch_a_wrong_expert_of_plain_lora(tiny_llama, monkeypatch) -> None:
    inject = peft.inject

    def doubled(model: nn.Module, adapter: Adapter) -> PeftModel:
        wrapped = inject(model, adapter)
        next(iter(layers_of(model).values())).set_scale("expert_00", 2.0)
        return wrapped

    monkeypatch.setattr(peft, "inject", doubled)
    checks = {check.check: check for check in checks_of(adapted(tiny_llama(), LORA), LORA, prompt())}
    assert not checks["logits"].passed and not checks["whole"].passed


def test_every_token_merges_once_and_unmerges_once(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, calls = adapted(tiny_llama(), ADAFUSE), []
    merge, unmerge = Linear.merge, Linear.unmerge
    monkeypatch.setattr(
        Linear, "merge", lambda self, **k: (calls.append(("in", k["safe_merge"])), merge(self, **k))
    )
    monkeypatch.setattr(Linear, "unmerge", lambda self: (calls.append(("out", False)), unmerge(self)))
    decode(decoder_of(adapter, ADAFUSE), tokens=3)
    every = len(adapter.sites)
    assert calls == ([("in", False)] * every + [("out", False)] * every) * 3


def test_the_choices_are_those_of_the_router(tiny_llama) -> None:
    adapter = adapted(tiny_llama(), ADAFUSE)
    decoder = decoder_of(adapter, ADAFUSE)
    with decoder.watching(), decoding(decoder) as token:
        assert decoder.choices()["token"].shape == (1, 12, 2)
        decoder.step(token)
        (chosen,) = decoder.choices().values()
        merged = [f"expert_{e:02d}" for e in chosen[0, 0].tolist()]
        layer = next(iter(layers_of(adapter.model).values()))
        touched = {name for name, scale in layer.scaling.items() if scale != layer.lora_alpha[name] / 4}
        assert touched == set(merged), "gates other than one are those of the chosen"
    lora = adapted(tiny_llama(), LORA)
    decoder = decoder_of(lora, LORA)
    with decoder.watching(), decoding(decoder) as token:
        decoder.step(token)
        assert decoder.choices() == {}
