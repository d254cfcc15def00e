"""What is trained by in bf16 on a GPU (a slot per chosen expert, sums in place) equals what is trained by elsewhere."""

import pytest
import torch

from adafuse.adapters import forward, layers, router
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.experts import BottleneckExperts, LoraExperts
from adafuse.adapters.forward import UnmergedChosen, UnmergedDense
from adafuse.adapters.router import Router
from adafuse.config import Normalisation
from synthetic.configurations import GEOMETRY, METHODS, compose

IDS = torch.arange(4, 36).view(2, 16)


def step(model, adapter, *, checkpointed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with adapter.installing():
        ids = IDS.to(adapter.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    return loss.detach(), gradients


def take(monkeypatch: pytest.MonkeyPatch, taken: list[object]) -> None:
    """Both forms' choice, which a CPU would never make."""
    for module in (layers, forward):
        monkeypatch.setattr(module, "is_fit_in_half", lambda x: taken.append(x) or torch.is_grad_enabled())


CASES = [
    ("mixlora", 1),
    ("mixlora", 2),
    ("mixlora", 4),
    ("lora", 2),
    ("adafuse", 2),
    ("mola", 2),
    ("pesc", 2),
]


@pytest.mark.parametrize(("method", "top_k"), CASES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_the_usual_form(
    method: str, top_k: int, checkpointed: bool, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, in which only what is computed can tell two forms apart; routers stay in fp32."""
    model = tiny_llama(num_hidden_layers=2).double()
    config = compose(*GEOMETRY, f"experts.top_k={top_k}", f"method={method}", "method.dropout=0")
    adapter = Adapter(model, config.method, config.experts, 0).to_dtype(torch.float64)
    randomise(adapter, 1, scale=0.5)
    loss, gradients = step(model, adapter, checkpointed=False)
    taken: list[object] = []
    take(monkeypatch, taken)
    other, others = step(model, adapter, checkpointed=checkpointed)
    assert taken and torch.allclose(loss, other, rtol=1e-6)
    for one, two in zip(gradients, others, strict=True):
        assert one.norm() > 0 and (one - two).norm() <= 1e-5 * one.norm()


def test_routers_that_read_the_same_are_asked_together(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2).double()
    config = compose(*GEOMETRY, "method=mola", "experts.targets=[q_proj,v_proj,o_proj,gate_proj,up_proj]")
    adapter = Adapter(model, config.method, config.experts, 0).to_dtype(torch.float64)
    take(monkeypatch, [])
    asked, together = [], layers.routed_together
    monkeypatch.setattr(
        layers, "routed_together", lambda found, x: asked.append(len(found)) or together(found, x)
    )
    step(model, adapter, checkpointed=True)
    # forward and recomputed
    assert asked == [2, 1, 2] * 4 and not adapter.context.ahead


def test_one_wrong_expert_is_seen(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2).double()
    config = compose(*GEOMETRY, "method=mixlora", "method.dropout=0")
    adapter = Adapter(model, config.method, config.experts, 0).to_dtype(torch.float64)
    randomise(adapter, 1, scale=0.5)
    loss, _ = step(model, adapter, checkpointed=False)
    take(monkeypatch, [])
    own = UnmergedChosen.expand_each
    monkeypatch.setattr(
        UnmergedChosen, "expand_each", lambda self, h, up, gates: own(self, h, up.roll(1, 0), gates)
    )
    assert not torch.allclose(loss, step(model, adapter, checkpointed=False)[0], rtol=1e-6)


@pytest.mark.parametrize("experts", [LoraExperts(32, 48, 5, 4, 8), BottleneckExperts(32, 4, 5)])
def test_of_experts_that_are_summed_too(experts) -> None:
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_()
    x_TI = torch.randn(7, 32)
    gates = Router(32, 5, 2, Normalisation.softmax_topk_renorm)(x_TI)
    found, wanted = (form.mix(experts, x_TI, gates) for form in (UnmergedChosen(), UnmergedDense()))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [(), ("x",), ("down", "up"), ("gates",)], ids=str)
def test_a_linear_in_one_node_has_the_gradients_of_its_parts(dropout: float, frozen: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (7, 32), "down": (5, 4, 32), "up": (5, 48, 4), "gates": (7, 5)}
    given = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }
    weight_OI, of_y_TO = torch.randn(48, 32).double(), torch.randn(7, 48).double()

    def parts(y_TO, x_TI, down_ERI, up_EOR, gates_TE, scaling, dropout):
        x_TI = torch.native_dropout(x_TI, dropout, True)[0] if dropout else x_TI
        h_TER = torch.einsum("ti,eri->ter", x_TI, down_ERI)
        return y_TO + scaling * torch.einsum("te,ter,eor->to", gates_TE, h_TER, up_EOR)

    found = []
    for form in (forward._Fitted.apply, parts):
        torch.manual_seed(1)
        y_TO = form(given["x"] @ weight_OI.T, *given.values(), 0.5, dropout)
        wanted = [one for one in given.values() if one.requires_grad]
        found.append([y_TO, *torch.autograd.grad(y_TO, wanted, of_y_TO)])
    # those of the factors are added in fp32
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_fit_on_a_cpu_keeps_its_form(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2).bfloat16()
    config = compose(*GEOMETRY, "method=mixlora")
    adapter = Adapter(model, config.method, config.experts, 0).to_dtype(torch.bfloat16)
    monkeypatch.setattr(UnmergedChosen, "mix", None)
    assert step(model, adapter, checkpointed=False)[0].isfinite()


def test_an_installed_strategy_and_a_model_in_eval_mode_keep_theirs(
    tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever forgets no_grad while he evaluates or decodes gets the strategy that he chose."""
    model = tiny_llama(num_hidden_layers=2).eval()
    take(monkeypatch, [])
    monkeypatch.setattr(UnmergedChosen, "mix", None)
    monkeypatch.setattr(forward, "fitted", None)
    monkeypatch.setattr(layers, "fitted", None)
    for method in ("mixlora", "adafuse", "pesc"):
        config = compose(*GEOMETRY, f"method={method}")
        adapter = Adapter(model, config.method, config.experts, 0)
        for strategy in (None, UnmergedDense()):
            with adapter.installing(strategy):
                assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("method", ["mixlora", "adafuse_layerwise", "pesc"])
def test_types_are_those_of_a_fit_in_bf16(method: str, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone in bf16, experts and routers in fp32, autocast: near the usual form, and the same when recomputed."""
    model = tiny_llama(num_hidden_layers=2).bfloat16()
    config = compose(*GEOMETRY, f"method={method}", "method.dropout=0")
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 1, scale=0.1)

    def norms(checkpointed: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = step(model, adapter, checkpointed=checkpointed)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        return torch.stack([loss, *(gradient.norm() for gradient in gradients)])

    usual = norms(False)
    take(monkeypatch, [])
    monkeypatch.setattr(
        router, "is_fit_in_half", lambda x: torch.is_grad_enabled() and x.dtype == torch.bfloat16
    )
    found = norms(False)
    assert abs(found[0] / usual[0] - 1) < 0.01 and abs(found[1:].norm() / usual[1:].norm() - 1) < 0.05
    assert torch.equal(norms(True), found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_both_forms_train_alike(method: str, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2).bfloat16().cuda()
    config = compose(*GEOMETRY, f"method={method}", "method.dropout=0")
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 1, scale=0.1)
    found = []
    for usual in (False, True):
        if usual:
            for module in (layers, forward, router):
                monkeypatch.setattr(module, "is_fit_in_half", lambda x: False)
        with torch.autocast("cuda", torch.bfloat16):
            loss, gradients = step(model, adapter, checkpointed=True)
        found.append(torch.stack([loss, torch.stack([one.norm() for one in gradients]).norm()]))
    torch.testing.assert_close(*found, rtol=0.05, atol=0)
