"""bench/checks.py: what a check could tell is said, and weights that hold the wrong experts are found."""

import dataclasses
import itertools

import pytest
import torch

from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.router import Gates
from adafuse.bench import checks
from adafuse.bench.checks import Check, run_checks
from adafuse.config import Runtime, StrategyName
from adafuse.engine import decoders
from adafuse.engine.make import make
from adafuse.refusals import MERGING
from adafuse.strategies import merge
from synthetic.configurations import GEOMETRY, compose

TOKENS = 8
MERGED = [
    *(
        (StrategyName.simple_merge, [f"method={name}"])
        for name in ("adafuse", "mola", "adafuse_layerwise", "lora")
    ),
    *((StrategyName.switch, [f"method={name}"]) for name in ("adafuse", "lora")),
    *((StrategyName.rebase, [f"method={name}"]) for name in ("adafuse", "lora")),
    (StrategyName.switch, ["method=adafuse", "method.router_input=embedding"]),
    (StrategyName.rebase, ["method=adafuse", "method.router_input=block0_output"]),
    (StrategyName.switch, ["method=adafuse", "method.null_expert=true", "method.bypass_penalty=0.1"]),
    (StrategyName.rebase, ["method=adafuse", "experts.targets=[gate_proj,down_proj]"]),
    (
        StrategyName.switch,
        ["method=adafuse", *(f"method.static_{knob}" for knob in ("targets=[q_proj]", "rank=4", "alpha=8"))],
    ),
]
IN_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(4, 260, (rows, 12), generator=torch.Generator().manual_seed(3))


def checked(
    model,
    strategy: StrategyName,
    overrides: list[str],
    dtype: torch.dtype = torch.float32,
    runtime: Runtime = Runtime.eager,
    scale: float = 0.3,
    tokens: int = TOKENS,
) -> dict[str, Check]:
    model, config = model.to(dtype), compose(*GEOMETRY, *overrides)
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=scale)
    decoder = make(model, adapter.to_dtype(dtype), strategy, runtime, 12 + tokens + 8)
    found = run_checks(decoder, reference.float_view(model), prompt().to(model.device), tokens).checks
    return {check.check: check for check in found}


@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
@IN_DTYPES
@pytest.mark.parametrize("arm", MERGED, ids=lambda arm: f"{arm[0].name},{','.join(arm[1])}")
def test_merged_weights_are_what_they_should_be(arm, dtype, runtime, tiny_llama) -> None:
    found = checked(tiny_llama(), *arm, dtype, runtime)
    assert all(check.passed for check in found.values()), [c for c in found.values() if not c.passed]
    # of what is merged: less than a fifth of it in either dtype, or the mutations below would prove nothing
    assert max(found["merged_first"].bound, found["merged"].bound) < 0.2, found["merged"]


@pytest.mark.gpu
@IN_DTYPES
@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
@pytest.mark.parametrize("method", ["adafuse", "lora"])
@pytest.mark.parametrize("strategy", MERGING, ids=lambda s: s.name)
def test_merged_weights_on_a_gpu(strategy, method, runtime, dtype, tiny_llama) -> None:
    """In a captured graph gates are those of the last replay, and of the warm-up nothing is left before the first."""
    model = tiny_llama(hidden_size=128, intermediate_size=256).cuda()
    found = checked(model, strategy, [f"method={method}"], dtype, runtime)
    assert all(check.passed for check in found.values()), [c for c in found.values() if not c.passed]
    assert max(found["merged_first"].bound, found["merged"].bound) < 0.2


@pytest.mark.parametrize("strategy", [s for s in StrategyName if s not in MERGING], ids=lambda s: s.name)
def test_who_leaves_weights_alone_has_no_such_check(strategy: StrategyName, tiny_llama) -> None:
    method = "lora" if strategy is StrategyName.peft else "adafuse"
    assert not {"merged", "merged_first"} & set(checked(tiny_llama(), strategy, [f"method={method}"]))


def scale_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fifth more than there should be, in and out."""
    packed = merge.packed_up
    monkeypatch.setattr(merge, "packed_up", lambda experts: 1.2 * packed(experts))


def leave_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the token before merged is not taken out."""
    shift = merge.Selection.shift

    def forget(self: merge.Selection, new: Gates) -> None:
        shift(self, new)
        self.gate_S[self.top_k :].zero_()

    monkeypatch.setattr(merge.Selection, "shift", forget)


def one_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token runs on the experts of the one before."""
    shift, held = merge.Selection.shift, {}

    def late(self: merge.Selection, new: Gates) -> None:
        shift(self, held.get(id(self), new))
        held[id(self)] = new

    monkeypatch.setattr(merge.Selection, "shift", late)


def one_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single linear among all is not merged into."""
    factors, seen = merge.factors, []

    def skip(up_ERO: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(up_ERO.data_ptr())
        up, down = factors(up_ERO, *rest)
        return (0 * up if up_ERO.data_ptr() == seen[0] else up), down

    monkeypatch.setattr(merge, "factors", skip)


@IN_DTYPES
@pytest.mark.parametrize("mutation", [scale_up, leave_in, one_late, one_linear])
@pytest.mark.parametrize("strategy", MERGING, ids=lambda s: s.name)
def test_a_wrong_merge_is_found(strategy, mutation, dtype, tiny_llama, monkeypatch) -> None:
    if strategy is StrategyName.rebase and mutation is leave_in:
        return  # it takes nothing out
    mutation(monkeypatch)
    found = checked(tiny_llama(), strategy, ["method=adafuse"], dtype)
    assert not found["merged"].passed, found["merged"]


def test_the_logits_alone_would_let_a_wrong_merge_pass(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the weights are looked at: in bf16 roundings in place may come to more than a fifth of the experts."""
    scale_up(monkeypatch)
    found = checked(tiny_llama(), StrategyName.switch, ["method=adafuse"], torch.bfloat16, scale=0.1)
    assert found["logits"].passed and found["greedy"].passed and not found["merged"].passed


def test_the_first_token_shows_what_roundings_hide_after_many(tiny_llama, monkeypatch) -> None:
    """Of two experts the weaker is left out of every token."""
    shift = merge.Selection.shift

    def weakest_out(self: merge.Selection, new: Gates) -> None:
        weights = new.weight_TK.where(new.weight_TK == new.weight_TK.amax(-1, keepdim=True), 0.0)
        shift(self, dataclasses.replace(new, weight_TK=weights))

    monkeypatch.setattr(merge.Selection, "shift", weakest_out)
    arm = (StrategyName.switch, ["method=adafuse"], torch.bfloat16)
    found = checked(tiny_llama(), *arm, scale=0.005, tokens=16)
    assert found["merged"].passed and "says little" in found["merged"].detail
    assert not found["merged_first"].passed and "first token" in found["merged_first"].detail


def test_a_bound_that_tells_little_says_so(tiny_llama) -> None:
    arm = (StrategyName.switch, ["method=adafuse"], torch.bfloat16)
    telling = checked(tiny_llama(), *arm, tokens=16)["merged"]
    little = checked(tiny_llama(), *arm, scale=0.01, tokens=16)["merged"]
    assert telling.bound < checks.TELLING < little.bound and little.passed
    assert "says little" in little.detail and "says little" not in telling.detail


def test_no_selection_is_larger_than_the_largest_expert(tiny_llama) -> None:
    config = compose(*GEOMETRY, "method=adafuse")
    adapter = Adapter(tiny_llama(), config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=0.3)
    for site in adapter.adapted().values():
        each = [float(reference.delta(site.lora, [e], [1.0]).norm()) for e in range(4)]
        assert checks._largest(site.lora) == pytest.approx(max(each))
        assert reference.delta(site.lora, [0, 2], [0.9, 0.1]).norm() < max(each)


def test_nothing_that_is_no_number_passes() -> None:
    sound, broken = checks.Merged(0.01, 0.1, 1.0), checks.Merged(float("nan"), 0.1, 1.0)
    assert checks.nearest([sound, broken]) is broken and checks.nearest([broken, sound]) is broken
    assert not checks._at_most("merged", broken.error, broken.bound, "").passed


def test_how_many_tokens_could_be_decided_is_said() -> None:
    want = torch.tensor([[[3.0, 0.0, 1.0], [1.0, 1.1, 0.0], [0.0, 1.0, 3.0]]])
    same, swapped = want.clone(), want.clone()
    # one that no rounding turns over, and one that it may
    swapped[0, 1] = torch.tensor([1.1, 1.0, 0.0])
    for got in (same, swapped):
        check = checks._greedy(got, want, 0.5, torch.bfloat16)
        assert check.passed and check.detail == "of 3 greedy tokens 2 could be decided; of those, different"
    swapped[0, 0] = torch.tensor([0.0, 3.0, 1.0])
    assert checks._greedy(swapped, want, 0.5, torch.bfloat16).value == 1
    assert "tokens 0 could be decided" in checks._greedy(swapped, want, 5.0, torch.bfloat16).detail
    # in fp32 every token is held to the reference
    exact = checks._greedy(swapped, want, 5.0, torch.float32)
    assert exact.value == 2 and "tokens 3 could be decided" in exact.detail


@pytest.mark.parametrize("strategy", [StrategyName.gather, StrategyName.switch], ids=lambda s: s.name)
def test_an_arm_in_place_decides_as_many_tokens_as_another(strategy: StrategyName, tiny_llama) -> None:
    """By the bounds alone it would decide hardly any."""
    detail = checked(tiny_llama(), strategy, ["method=adafuse"], torch.bfloat16)["greedy"].detail
    assert int(detail.split()[4]) >= TOKENS // 2, detail


def test_a_wrong_token_among_many_is_found(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one position the two best logits change places, which moves the mean error little."""
    step, turn = decoders.Eager.step, itertools.count()

    def swapped(self: decoders.Eager, token_B1: torch.Tensor) -> torch.Tensor:
        logits_BV = step(self, token_B1)
        if next(turn) == 5:
            best = logits_BV.topk(2, dim=-1)
            logits_BV = logits_BV.scatter(-1, best.indices, best.values.flip(-1))
        return logits_BV

    monkeypatch.setattr(decoders.Eager, "step", swapped)
    found = checked(tiny_llama(), StrategyName.switch, ["method=adafuse"], torch.bfloat16)
    assert found["logits"].passed and found["greedy"].value == 1 and not found["greedy"].passed


def test_what_the_adapter_moves_is_said_beside_the_bound(tiny_llama) -> None:
    large = checked(tiny_llama(), StrategyName.gather, ["method=adafuse"], torch.bfloat16)["logits"]
    small = checked(tiny_llama(), StrategyName.gather, ["method=adafuse"], torch.bfloat16, scale=1e-3)[
        "logits"
    ]
    blind = "so that the backbone without it would pass as well"
    assert blind in small.detail and blind not in large.detail
    moved = [float(check.detail.split("reference by is ")[1].split(",")[0]) for check in (small, large)]
    assert 0 < moved[0] < small.bound and large.bound < moved[1]


def test_the_backbone_has_no_effect_to_speak_of(tiny_llama) -> None:
    decoder = make(tiny_llama(), None, StrategyName.dense, Runtime.eager, 64)
    found = run_checks(decoder, reference.float_view(decoder.model), prompt(), 8)
    assert found.passed and not any("moves the reference" in check.detail for check in found.checks)


@pytest.mark.parametrize("strategy", [StrategyName.switch, StrategyName.rebase])
def test_experts_without_any_effect_are_measured_against_the_weights(
    strategy: StrategyName, tiny_llama
) -> None:
    """As they are before training, and those that a table names though training never chose them."""
    found = checked(tiny_llama(), strategy, ["method=adafuse"], torch.bfloat16, scale=0.0)["merged"]
    assert found.passed and found.value == 0 and found.detail.endswith("the norm of W0, for dW is nothing")
