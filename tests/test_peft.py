"""PEFT on our backbone: the same function as the reference, every gate at its expert, and nothing left behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from adafuse import records
from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.randomise import randomise
from adafuse.adapters.router import Gates
from adafuse.bench import cost, device, latency
from adafuse.bench.checks import Check, run_checks
from adafuse.config import Routing, Runtime, StrategyName
from adafuse.engine import decoders, peft, projections
from conftest import GEOMETRY, compose

LORA = (StrategyName.peft, ["method=lora"])
ADAFUSE = (StrategyName.peft_merge, ["method=adafuse"])
Arm = tuple[StrategyName, list[str]]
ARMS = [
    LORA,
    (StrategyName.peft, ["method=lora", "experts.targets=[q_proj,v_proj]"]),
    ADAFUSE,
    (StrategyName.peft_merge, ["method=adafuse", "method.router_input=embedding"]),
    (StrategyName.peft_merge, ["method=adafuse", "method.router_input=block0_output"]),
    (StrategyName.peft_merge, ["method=adafuse", "method.normalisation=softmax_topk_raw"]),
    (StrategyName.peft_merge, ["method=adafuse", "experts.targets=[gate_proj,down_proj]"]),
]
DTYPES = (torch.float32, torch.bfloat16)
BOTH = pytest.mark.parametrize("arm", [LORA, ADAFUSE], ids=lambda arm: arm[0].name)
IN_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(4, 260, (rows, 12), generator=torch.Generator().manual_seed(3))


def adapted(model, arm: Arm) -> Adapter:
    """Experts in the backbone's dtype, as a timed arm has them."""
    config = compose(*GEOMETRY, *arm[1])
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=0.3)
    return adapter.to_dtype(model.dtype)


def decoder_of(adapter: Adapter, arm: Arm) -> decoders.Decoder:
    return decoders.make(adapter.model, adapter, arm[0], Runtime.eager, length=64)


def checks_of(adapter: Adapter, arm: Arm, ids: torch.Tensor) -> list[Check]:
    oracle = reference.float_view(adapter.model)
    return run_checks(decoder_of(adapter, arm), oracle, ids, tokens=16).checks


def passes(adapter: Adapter, arm: Arm, ids: torch.Tensor) -> list[str]:
    """Names of the checks, all of them passed."""
    checks = checks_of(adapter, arm, ids)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    return sorted(check.check for check in checks)


def decode(decoder: decoders.Decoder, tokens: int = 16) -> torch.Tensor:
    with decoder.installed():
        decoder.start(prompt())
        with decoder.decoding():
            return decoder.run(tokens)


@contextmanager
def decoding(decoder: decoders.Decoder) -> Iterator[torch.Tensor]:
    """Ready to step; yields the first token."""
    with decoder.installed():
        token = decoder.start(prompt()).argmax(-1, keepdim=True)
        with decoder.decoding():
            yield token


def layers_of(model: nn.Module) -> dict[str, Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


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


def found(model: nn.Module) -> dict[str, object]:
    """What a decoder must leave as it was: modules, their types, attributes and hooks, weights and where they lie."""
    state: dict[str, object] = {"attributes": sorted(vars(model)), "config": model.config.to_dict()}
    for path, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state[path] = id(module), type(module), module.training, hooks, sorted(vars(module))
    for path, weight in model.named_parameters():
        state[path] = id(weight), weight.data_ptr(), weight.dtype, weight.requires_grad, weight.stride()
    return state


@IN_DTYPES
@BOTH
def test_the_backbone_is_left_as_it_was(arm: Arm, dtype: torch.dtype, tiny_llama) -> None:
    """Twice: PEFT's modules are made once and put in again."""
    model = tiny_llama().to(dtype)
    projections.join(model)
    adapter = adapted(model, arm)
    decoder = decoder_of(adapter, arm)
    before, weights = found(model), [weight.clone() for weight in model.parameters()]
    first = decode(decoder)
    for _ in range(2):
        assert found(model) == before
        assert not any(type(module).__module__.startswith("peft") for module in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
        assert torch.equal(decode(decoder), first), "the second decode starts from the same weights"


def test_bf16_weights_need_their_copy(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PEFT takes out again is not what it put in; without this the test above could not fail."""
    adapter = adapted(tiny_llama().to(torch.bfloat16), ADAFUSE)
    weights = [weight.clone() for weight in adapter.model.parameters()]
    monkeypatch.setattr(peft.PeftMerge, "restore", lambda self: None)
    decode(decoder_of(adapter, ADAFUSE))
    assert not all(torch.equal(a, b) for a, b in zip(adapter.model.parameters(), weights, strict=True))


def test_a_token_that_breaks_off_leaves_nothing_merged(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    projections.join(model)
    adapter, before = adapted(model, ADAFUSE), found(model)
    weights = [weight.clone() for weight in model.parameters()]
    decoder = decoder_of(adapter, ADAFUSE)
    want = decode(decoder)
    with decoder.installed():
        decoder.start(prompt())
        with (
            monkeypatch.context() as broken,
            pytest.raises(RuntimeError, match="half way"),
            decoder.decoding(),
        ):
            broken.setattr(model.lm_head, "forward", _fail)
            decoder.run(1)
        decoder.start(prompt())
        with decoder.decoding():
            assert torch.equal(decoder.run(16), want)
    assert found(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def _fail(*_: object) -> None:
    raise RuntimeError("half way")


@pytest.mark.parametrize("joined_first", [True, False])
@BOTH
def test_joined_projections_stay_joined(arm: Arm, joined_first: bool, tiny_llama) -> None:
    """Our arms run the same weights as one matrix, before PEFT's arm and after it."""
    model = tiny_llama()
    adapter = adapted(model, arm)
    if joined_first:
        projections.join(model)
    decode(decoder_of(adapter, arm))
    joined = projections.join(model)
    starts = [projection.storage_OI.data_ptr() for projection in joined]
    decoder = decoder_of(adapter, arm)
    with decoder.installed():
        decoder.start(prompt())
        with decoder.decoding():
            decoder.run(4)
            assert all(projection.is_joined() for projection in joined)
    assert projections.join(model) is joined
    assert [projection.storage_OI.data_ptr() for projection in joined] == starts
    for projection in joined:
        assert projection.is_joined() and all(type(linear) is nn.Linear for linear in projection.linears)
        rows = torch.cat([linear.weight for linear in projection.linears])
        assert torch.equal(rows, projection.weight_OI)
    gather = decoders.make(model, adapter, StrategyName.gather, Runtime.eager, 64)
    assert run_checks(gather, reference.float_view(model), prompt(), 8).passed


def test_one_selection_serves_one_sequence(tiny_llama) -> None:
    model = tiny_llama()
    checks = {check.check: check for check in checks_of(adapted(model, ADAFUSE), ADAFUSE, prompt(rows=2))}
    assert "merges one selection for the whole batch: use batch=1" in checks["runs"].detail
    assert all(check.passed for name, check in checks.items() if name != "runs")
    assert not layers_of(model)


STATIC = ["method.static_targets=[q_proj]", "method.static_rank=4", "method.static_alpha=8"]
REFUSED = [
    (StrategyName.peft, ["method=adafuse"], Runtime.eager, "PEFT has no router; use method lora"),
    (StrategyName.peft_merge, ["method=mola"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft_merge, ["method=pesc"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft_merge, ["method=mixlora"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft_merge, ["method=lora"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft, ["method=lora"], Runtime.graph, "runs eagerly: use runtime=eager"),
    (StrategyName.peft_merge, ["method=adafuse"], Runtime.compiled, "runs eagerly: use runtime=eager"),
    (StrategyName.peft_merge, ["method=adafuse", *STATIC], Runtime.eager, "use static_targets="),
]


@pytest.mark.parametrize(("strategy", "overrides", "runtime", "message"), REFUSED)
def test_what_peft_cannot_do_is_refused(strategy, overrides, runtime, message, tiny_llama) -> None:
    adapter = adapted(tiny_llama(), (strategy, overrides))
    with pytest.raises(ValueError, match=message) as refusal:
        decoders.make(adapter.model, adapter, strategy, runtime, 64)
    assert "\n" not in str(refusal.value)


def test_a_backbone_without_an_adapter_is_refused(tiny_llama) -> None:
    with pytest.raises(ValueError, match="needs an adapter: use a method with experts"):
        decoders.make(tiny_llama(), None, StrategyName.peft, Runtime.eager, 64)


def test_macs(tiny_llama) -> None:
    """A merge multiplies every element of a weight by the rank, for each chosen expert, once in and once out."""
    model = tiny_llama()
    lora, adafuse = adapted(model, LORA), adapted(model, ADAFUSE)
    plain = cost.count_macs(model, None, StrategyName.dense, prompt())
    own = cost.count_macs(model, lora, StrategyName.peft, prompt()) - plain
    assert own == sum(parameter.numel() for parameter in lora.parameters())
    assert own == cost.count_macs(model, lora, StrategyName.dense, prompt()) - plain
    merged = cost.count_macs(model, adafuse, StrategyName.peft_merge, prompt()) - plain
    products = 2 * 2 * 4 * sum(site.base.weight.numel() for site in adafuse.linears())
    assert merged == products + adafuse.token_router.weight.numel()
    assert not layers_of(model)


@IN_DTYPES
def test_bytes(dtype: torch.dtype, tiny_llama) -> None:
    model = tiny_llama().to(dtype)
    lora, adafuse = adapted(model, LORA), adapted(model, ADAFUSE)
    each = dtype.itemsize
    experts = sum(parameter.numel() for parameter in lora.parameters())
    for batch in (1, 8):
        assert cost.adapter_bytes(lora, StrategyName.peft, batch) == each * experts
    weights = sum(site.base.weight.numel() for site in adafuse.linears())
    chosen = sum(p.numel() for p in adafuse.parameters() if p is not adafuse.token_router.weight) * 2 // 4
    router = 4 * adafuse.token_router.weight.numel()
    got = cost.adapter_bytes(adafuse, StrategyName.peft_merge, batch=1)
    assert got == router + each * (4 * weights + 2 * chosen)
    switch = cost.adapter_bytes(adafuse, StrategyName.switch, batch=1)
    assert got - switch == each * 2 * weights, (
        "one more reading and writing of the weights than our merge in place"
    )


def test_what_the_arms_hold(tiny_llama) -> None:
    """PEFT's modules share our factors; merging in place holds nothing more."""
    model = tiny_llama()
    lora, adafuse = adapted(model, LORA), adapted(model, ADAFUSE)
    backbone = cost.weights_gib(model, None, StrategyName.dense)
    own = sum(parameter.numel() for parameter in lora.parameters()) * 4 / 2**30
    assert cost.weights_gib(model, lora, StrategyName.peft) == pytest.approx(backbone + own)
    held = cost.weights_gib(model, adafuse, StrategyName.peft_merge)
    assert held == cost.weights_gib(model, adafuse, StrategyName.switch)


def test_the_cell_times_both(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)
    quick = ["latency.rounds=2", "latency.check_tokens=8", "latency.trained_adapters=false", "context=8"]
    config = compose(
        *GEOMETRY, *quick, "arms=peft", "arms.run=[lora_dense,lora_peft,adafuse_switch,adafuse_peft_merge]"
    )
    run = {"task": "latency", "cell_id": "c", "config_hash": "0", "config": {}, "machine": {}, "schema": 1}
    with records.open_record(tmp_path / "cell.jsonl", run) as record:
        latency.run(config, tiny_llama(), "cpu", record)
    written = records.read(tmp_path / "cell.jsonl")
    assert written.status == "ok", written.of("error")
    assert all(line["passed"] for line in written.of("check"))
    assert sorted(line["arm"] for line in written.of("block")) == sorted(config.arms.run * 2)
