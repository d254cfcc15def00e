"""PEFT's arms leave the backbone as it was: its modules, its weights to the bit, and projections that are joined."""

import pytest
import torch
from torch import nn

from adafuse.adapters import reference
from adafuse.bench.checks import run_checks
from adafuse.config import Runtime, StrategyName
from adafuse.engine import peft
from adafuse.engine.make import make
from adafuse.model import projections
from synthetic.adapters import prompt
from synthetic.peft import ADAFUSE, BOTH, IN_DTYPES, Arm, adapted, decode, decoder_of


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
    gather = make(model, adapter, StrategyName.gather, Runtime.eager, 64)
    assert run_checks(gather, reference.float_view(model), prompt(), 8).passed
