"""Static runtimes: joined projections, one shared position, a step that never asks the host; off a GPU, uncaptured."""

from contextlib import nullcontext

import pytest
import torch

from adafuse import strategies
from adafuse.adapters import gate_table
from adafuse.adapters.adapter import Adapter
from adafuse.config import GateSource, Runtime, StrategyName
from adafuse.engine.decode import generate
from adafuse.engine.graph import Static
from adafuse.engine.make import make
from adafuse.model.projections import join
from synthetic.adapters import adapted, prompt
from synthetic.configurations import GEOMETRY, compose


def adapter_on(model, *overrides: str) -> Adapter:
    return adapted(model, compose(*GEOMETRY, *overrides))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_joining_moves_weights_and_changes_nothing(model_type: str, tiny_llama) -> None:
    model = tiny_llama(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(prompt()).logits
    first = join(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(prompt()).logits, logits)
    assert [len(p.linears) for p in first[:4]] == [3, 1, 2, 1] and len(first) == 16
    assert (first[0].bias_O is not None) == (model_type == "qwen2")
    for projection in first:
        assert torch.equal(projection.weight_OI, torch.cat([linear.weight for linear in projection.linears]))
        projection.linears[-1].weight.data.zero_()
        assert not projection.weight_OI[-projection.widths[-1] :].any(), (
            "the linears are views of the joined weight"
        )


def test_joining_twice_moves_nothing(tiny_llama) -> None:
    model = tiny_llama()
    first = [p.weight_OI.data_ptr() for p in join(model)]
    assert [p.weight_OI.data_ptr() for p in join(model)] == first


@pytest.mark.parametrize("strategy", [StrategyName.dense, StrategyName.fused], ids=lambda s: s.name)
def test_the_plain_backbone_decodes_the_same_tokens(strategy: StrategyName, tiny_llama) -> None:
    model = tiny_llama()
    want = generate(model, None, prompt(2), None, 24)[:, 12:]
    decoder = make(model, None, strategy, Runtime.graph, 40)
    with decoder.installed():
        first = decoder.start(prompt(2)).argmax(-1, keepdim=True)
        with decoder.decoding():
            got = torch.cat([first, decoder.run(23)], dim=1)
    assert torch.equal(got, want)


def test_a_block_can_be_decoded_again(tiny_llama) -> None:
    """Between blocks the adapter leaves and other arms write to the weights; the second block must be the first."""
    model = tiny_llama()
    adapter = adapter_on(model, "method=adafuse")
    decoder = make(model, adapter, StrategyName.switch, Runtime.graph, 40)
    clean = [p.clone() for p in model.parameters()]
    blocks = []
    for _ in range(2):
        with decoder.installed():
            (decoder.again if blocks else decoder.start)(prompt())
            with decoder.decoding():
                blocks.append(torch.cat([decoder.run(4), decoder.run(12)], dim=1).clone())
        assert all(torch.equal(now, before) for now, before in zip(model.parameters(), clean, strict=True))
    assert torch.equal(*blocks)


class Recorder:
    """Stands in for torch.cuda's streams and graphs where there is no device."""

    replay = wait_stream = lambda *_: None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("adafuse", StrategyName.switch),
        ("adafuse", StrategyName.rebase),
        ("adafuse method.router_input=previous_token", StrategyName.rebase),
        ("mola", StrategyName.simple_merge),
        ("lora", StrategyName.rebase),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_capture_leaves_the_weights_as_it_found_them(
    method: str, strategy: StrategyName, dtype: torch.dtype, tiny_llama, monkeypatch
) -> None:
    """Its warm-up merges the experts of tokens that count for nothing, and is no token before the first; plain LoRA is
    merged before it, and stays.
    """
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Recorder)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    model = tiny_llama().to(dtype)
    weights = list(model.parameters())
    clean = [p.clone() for p in weights]
    adapter = adapter_on(model, *f"method={method}".split()).to_dtype(dtype)
    decoder = make(model, adapter, strategy, Runtime.graph, 40)
    assert isinstance(decoder, Static)
    with decoder.installed():
        decoder.start(prompt())
        with decoder.decoding():
            before, states = [p.clone() for p in weights], [state.clone() for state in decoder._state()]
            decoder._capture()
            assert len(states) == ("previous" in method)
            assert all(map(torch.equal, decoder._state(), states))
            assert all(torch.equal(now, was) for now, was in zip(weights, before, strict=True))
            merged = [not torch.equal(now, was) for now, was in zip(before, clean, strict=True)]
            assert any(merged) == (method == "lora")


def test_a_full_cache_is_refused_before_it_is_overrun(tiny_llama) -> None:
    decoder = make(tiny_llama(), None, StrategyName.dense, Runtime.graph, 20)
    decoder.start(prompt())
    with (
        decoder.decoding(),
        pytest.raises(ValueError, match="cache of 64 slots is full: make the decoder longer"),
    ):
        decoder.run(60)


def test_a_replay_that_nobody_launched_is_noticed(tiny_llama) -> None:
    decoder = make(tiny_llama(), None, StrategyName.dense, Runtime.graph, 20)
    assert isinstance(decoder, Static)
    decoder.start(prompt())
    with pytest.raises(AssertionError, match="decoded up to 14, launched up to 13"), decoder.decoding():
        decoder.run(1)
        decoder._replay()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
def test_a_table_whose_rows_were_not_taken_one_by_one_is_noticed(runtime, where: str, tiny_llama) -> None:
    """Steps that warm a graph up take none."""
    model, ids = tiny_llama().to(where), prompt().to(where)
    adapter = adapter_on(model, "method=adafuse")
    table = gate_table.make(GateSource.uniform, adapter.geometry, 1, 0, where)
    adapter.context.gate_table = table
    decoder = make(model, adapter, StrategyName.gather, runtime, 40)
    with decoder.installed():
        decoder.start(ids)
        with decoder.decoding():
            decoder.step(decoder.run(2)[:, -1:])
        assert int(table.step) == 3
        with decoder.decoding():
            table.restart()
            decoder.run(4)
        assert int(table.step) == 4
        with pytest.raises(AssertionError, match="took gates up to 6, launched up to 7"), decoder.decoding():
            decoder.run(3)
            table.step.sub_(1)


def test_members_leave_when_they_should(tiny_llama) -> None:
    model = tiny_llama()
    before = dict(model.named_modules())
    decoder = make(model, adapter_on(model, "method=mola"), StrategyName.gather, Runtime.graph, 40)
    with decoder.installed():
        decoder.start(prompt())
        with decoder.decoding():
            decoder.run(2)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("adafuse", StrategyName.gather),
        ("adafuse", StrategyName.fused),
        ("adafuse method.router_input=previous_and_embedding", StrategyName.gather),
        ("adafuse_layerwise", StrategyName.gather),
        ("pesc", StrategyName.gather),
        ("mixlora", StrategyName.dense),
    ],
)
def test_nothing_breaks_the_compiled_graph(method: str, strategy: StrategyName, tiny_llama) -> None:
    """The whole step is one graph (fullgraph), and what it computes is what the uncompiled step does."""
    model = tiny_llama(num_hidden_layers=2)
    adapter = adapter_on(model, *f"method={method}".split())
    logits = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="aot_eager", fullgraph=True)):
        decoder = make(model, adapter, strategy, Runtime.graph, 40)
        decoder._forward = wrap(decoder._eager_forward)
        with decoder.installed():
            token = decoder.start(prompt()).argmax(-1, keepdim=True)
            with decoder.decoding(), torch.no_grad():
                logits.append(decoder.step(token))
                choices = decoder.choices()
        assert set(choices) == set(adapter.routers())
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [Runtime.graph, Runtime.compiled], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "strategy", [StrategyName.dense, StrategyName.gather, StrategyName.fused], ids=lambda s: s.name
)
def test_captured_steps_decode_the_same_tokens(runtime: Runtime, strategy: StrategyName, tiny_llama) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256).cuda()
    adapter = adapter_on(model, "method=adafuse")
    adapter.install(strategies.make(StrategyName.loop))
    want = generate(model, adapter, prompt().cuda(), None, 24)[:, 12:]
    adapter.remove()
    decoder = make(model, adapter, strategy, runtime, 40)
    with decoder.installed():
        first = decoder.start(prompt().cuda()).argmax(-1, keepdim=True)
        with decoder.decoding():
            assert torch.equal(torch.cat([first, decoder.run(23)], dim=1), want)
