"""Runtime lean on real shapes, in bf16, captured: checks, overlapping launches, long contexts, many replays."""

import pytest
import torch

from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.bench.checks import run_checks
from adafuse.config import Runtime, StrategyName
from adafuse.engine.lean import Lean
from adafuse.engine.make import make
from adafuse.kernels import lean
from adafuse.kernels.beside import DOWN
from adafuse.model.backbone import build_random
from synthetic.configurations import compose

pytestmark = pytest.mark.gpu
WHERE = "cuda"
CASES = [
    *(
        ("llama2_7b", arm, batch)
        for arm in ("base", "adafuse", "adafuse_layerwise")
        for batch in (1, 2, 8, 33)
    ),
    *(("llama2_7b", "mixlora", batch) for batch in (1, 2, 8, 64)),
    *(("llama2_7b", arm, 1) for arm in ("lora", "pesc", "mola", "adafuse_switch", "adafuse_rebase")),
    *(
        (name, arm, batch)
        for name in ("qwen2_5_7b", "mistral_7b")
        for arm in ("base", "adafuse")
        for batch in (1, 8)
    ),
]


def made(name: str, arm: str, length: int, blocks: int = 2, *overrides: str) -> Lean:
    """The arm's decoder on a few blocks of a real shape, with experts that do something."""
    method, _, merge = arm.partition("_")
    if merge not in ("switch", "rebase"):
        method, merge = arm, ""
    shape = f"model.shape.num_hidden_layers={blocks}"
    config = compose("profile=gpu", f"model={name}", shape, f"method={method}", *overrides)
    model, adapter = build_random(config.model, WHERE).eval().requires_grad_(False), None
    if config.method.has_experts:
        adapter = Adapter(model, config.method, config.experts, seed=0)
        randomise(adapter, seed=1)
        adapter.to_dtype(model.dtype)
    strategy = merge or ("gather" if adapter else "dense")
    decoder = make(model, adapter, StrategyName[strategy], Runtime.lean, length)
    assert isinstance(decoder, Lean)
    return decoder


def prompt(decoder: Lean, batch: int, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    words = decoder.model.config.vocab_size
    return torch.randint(4, words, (batch, context), generator=generator).to(WHERE)


def check(decoder: Lean, batch: int, context: int, tokens: int) -> None:
    view = reference.float_view(decoder.model)
    found = run_checks(decoder, view, prompt(decoder, batch, context), tokens).checks
    assert all(one.passed for one in found), [one for one in found if not one.passed]


@pytest.mark.parametrize(("name", "arm", "batch"), CASES)
def test_real_shapes_pass_every_check(name: str, arm: str, batch: int) -> None:
    check(made(name, arm, 128 + 32), batch, 128, 16)


@pytest.mark.parametrize("arm", ["base", "adafuse"])
def test_512_steps_stay_within_the_bound(arm: str) -> None:
    check(made("llama2_7b", arm, 128 + 512 + 8), 1, 128, 512)


@pytest.mark.parametrize(
    ("name", "context"), [("llama2_7b", 3900), ("mistral_7b", 4200), ("qwen2_5_7b", 8192)]
)
def test_long_contexts(name: str, context: int) -> None:
    """Cut into parts, and beyond Mistral's window."""
    check(made(name, "base", context + 64, 1), 1, context, 8)


@pytest.mark.parametrize("rank", [8, 64, 128])
@pytest.mark.parametrize("arm", ["adafuse", "adafuse_layerwise"])
def test_ranks(arm: str, rank: int) -> None:
    for batch in (1, 8):
        check(made("mistral_7b", arm, 64, 1, f"experts.rank={rank}", "experts.top_k=3"), batch, 32, 8)


@pytest.mark.parametrize("arm", ["base", "adafuse", "adafuse_layerwise"])
def test_launches_that_start_early_change_nothing(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits: what a launch reads early is what it would read later."""
    if not lean._hopper(0):
        pytest.skip("no launch starts early on this device")
    logits = []
    for early in (True, False):
        monkeypatch.setattr(lean, "_hopper", lambda index, early=early: early)
        decoder = made("llama2_7b", arm, 256)
        ids = prompt(decoder, 1, 128)
        with decoder.installed():
            token = decoder.start(ids).argmax(-1, keepdim=True)
            with decoder.decoding():
                steps = []
                for _ in range(48):
                    steps.append(decoder.step(token))
                    token = steps[-1].argmax(-1, keepdim=True)
        logits.append(torch.stack(steps))
    assert torch.equal(*logits)


@pytest.mark.parametrize("arm", ["base", "adafuse"])
def test_ten_thousand_replays_move_nothing(arm: str) -> None:
    """Blocks begin where they should, end where they should, and are the same from the first to the last."""
    decoder, blocks = made("llama2_7b", arm, 700, 1), []
    ids = prompt(decoder, 1, 128)
    with decoder.installed():
        decoder.start(ids)
        for _ in range(20):
            decoder.again(ids)
            with decoder.decoding():
                blocks.append(decoder.run(500).clone())
            assert int(decoder.position) == 128 + 500
    assert all(torch.equal(block, blocks[0]) for block in blocks)
    plan = decoder._plan
    assert plan is not None
    partial = plan.blocks[0].attend.partial
    assert (plan.next.flags == DOWN).all() and not (plan.next.ended.any() or partial.ended.any())


def test_sampling_in_a_graph() -> None:
    decoder = made("llama2_7b", "base", 256, 1)
    ids = prompt(decoder, 2, 32)
    with decoder.installed():
        decoder.start(ids)
        found = []
        for seed in (1, 2, 1):
            decoder.again(ids)
            with decoder.decoding(), decoder.sampling(1.0, seed):
                found.append(decoder.run(64).clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert not torch.equal(found[0][0], found[0][1])
