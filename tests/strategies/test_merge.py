"""strategies/merge.py: gates that all linears share are made ready once a token; what tokens without experts cost."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adafuse import strategies
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates
from adafuse.config import Config, Runtime, StrategyName
from adafuse.engine.make import make
from adafuse.strategies import merge
from synthetic.adapters import adapted, one_selection, prompt
from synthetic.configurations import GEOMETRY, compose


def no_experts(index: int) -> Gates:
    """A token that is left to the backbone: the numbers of its experts mean nothing."""
    return Gates(torch.full((1, 2), index), torch.zeros(1, 2), torch.full((1, 4), 0.25))


def some_experts(*pair: int) -> Gates:
    return Gates(torch.tensor([pair]), one_selection(0).weight_TK, torch.full((1, 4), 0.25))


def installed(adapter: Adapter, strategy: StrategyName, launched: bool) -> merge.Switch:
    """Ready to decode; `launched`: by the kernel that a GPU launches, in Triton's interpreter."""
    adapter.install(strategies.make(strategy))
    decode = adapter.context.decode
    if launched:
        decode._plan = decode._planned()
    return decode


def without_third_expert(model, config: Config) -> Adapter:
    """Expert 3 is NaN: a gate of zero must not let it in."""
    adapter = adapted(model, config)
    for site in adapter.adapted().values():
        site.experts.lora_A.data[3] = site.experts.lora_B.data[3] = float("nan")
    return adapter


ONE_LAUNCH = pytest.mark.parametrize(
    "strategy", [StrategyName.switch, StrategyName.rebase], ids=lambda s: s.name
)
LAUNCHED = pytest.mark.parametrize("launched", [False, True], ids=["products", "kernel"])


@LAUNCHED
@ONE_LAUNCH
def test_tokens_without_experts_leave_no_trace(strategy, launched, tiny_llama) -> None:
    """Whatever comes before it, a token without experts has the clean weights, and one with experts its own."""
    model, config = tiny_llama(num_hidden_layers=1), compose(*GEOMETRY, "method=adafuse")
    adapter = without_third_expert(model, config)
    clean = [site.base.weight.clone() for site in adapter.adapted().values()]

    def weights_after(*tokens: Gates) -> list[torch.Tensor]:
        decode = installed(adapter, strategy, launched)
        for gates in tokens:
            decode.decide(gates)
        found = [site.base.weight.clone() for site in adapter.adapted().values()]
        adapter.remove()
        return found

    first, last, none = some_experts(0, 2), some_experts(2, 1), no_experts(3)
    # what is added and subtracted in place rounds; what starts from clean weights is exact
    exact = {"rtol": 0.0, "atol": 0.0 if strategy is StrategyName.rebase else 1e-6}
    merged = weights_after(last)
    assert all(map(torch.equal, weights_after(none), clean)), "the first token of all"
    for before in ([none], [first, none], [first, none, none], [none, first, none]):
        torch.testing.assert_close(weights_after(*before), clean, **exact)
        torch.testing.assert_close(weights_after(*before, last), merged, **exact)


@LAUNCHED
@ONE_LAUNCH
def test_nothing_is_written_between_two_tokens_without_experts(strategy, launched, tiny_llama) -> None:
    model, config = tiny_llama(num_hidden_layers=1), compose(*GEOMETRY, "method=adafuse")
    adapter = without_third_expert(model, config)
    weights = [site.base.weight for site in adapter.adapted().values()]
    clean = [weight.clone() for weight in weights]
    decode = installed(adapter, strategy, launched)
    for before in ([], [some_experts(0, 2), no_experts(3)]):
        for gates in before:
            decode.decide(gates)
        for weight in weights:
            weight.fill_(7.0)
        decode.decide(no_experts(3))
        assert all(bool((weight == 7.0).all()) for weight in weights)
        decode.restore()
        assert all(map(torch.equal, weights, clean))
    adapter.remove()


class Operations(TorchDispatchMode):
    """How often each operator of torch is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[str(func)] += 1
        return func(*args, **kwargs or {})


def shifted_at_every_linear(self: merge.SimpleMerge, site, x_TI, gates) -> torch.Tensor:
    """The form that published records timed: each linear has a copy of the selection, and shifts it for itself."""
    own = self.__dict__.setdefault("own", {})
    selection = own.setdefault(site, merge.Selection(gates.index_TK.shape[1], x_TI.device))
    selection.shift(gates)
    up, down = self._up[site][selection.index_S], site.lora.lora_A[selection.index_S]
    down = down * selection.gate_S.to(down.dtype)[:, None, None]
    site.base.weight.addmm_(up.flatten(0, 1).T, down.flatten(0, 1))
    return site.base(x_TI)


@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("method", "decisions"),
    # of four blocks with two adapted linears each
    [(["method=adafuse"], 1), (["method=adafuse", "method.blocks_per_decision=2"], 2), (["method=mola"], 8)],
    ids=["token", "two decisions", "layerwise"],
)
def test_simple_merge_shifts_gates_once_for_all_that_share_them(
    method, decisions, runtime, tiny_llama, monkeypatch
) -> None:
    """Bit for bit what a shift at every linear gives, of one launch a decision."""
    config = compose(*GEOMETRY, *method, "experts.targets=[q_proj,down_proj]")

    def decoded() -> tuple[torch.Tensor, Counter[str]]:
        """Logits of five tokens, operators of the last."""
        model = tiny_llama(num_hidden_layers=4).to(torch.bfloat16)
        adapter = adapted(model, config).to_dtype(torch.bfloat16)
        decoder, logits = make(model, adapter, StrategyName.simple_merge, runtime, 20), []
        with decoder.installed():
            logits.append(decoder.start(prompt()))
            with decoder.decoding():
                for _ in range(5):
                    with Operations() as seen:
                        logits.append(decoder.step(logits[-1].argmax(-1, keepdim=True)))
        return torch.stack(logits), seen.counted

    found, operations = decoded()
    assert (operations["aten.addmm_.default"], operations["aten.neg.out"]) == (8, decisions)
    monkeypatch.setattr(merge.SimpleMerge, "linear", shifted_at_every_linear)
    before, all_operations = decoded()
    assert torch.equal(found, before)
    # a shift copies thrice and changes the sign, and its gates are rounded
    spared = all_operations - operations
    each = {"aten.copy_.default": 3, "aten.neg.out": 1, "aten._to_copy.default": 1}
    assert {name: spared[name] for name in each} == {name: n * (8 - decisions) for name, n in each.items()}
