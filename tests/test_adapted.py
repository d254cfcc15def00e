"""What an adapted model is put through besides generating: copies, other people's trainers, threads, interruptions."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, Trainer, TrainingArguments

import adafuse
from adafuse.adapters.adapter import randomise
from adafuse.model.backbone import byte_tokenizer
from adafuse.training import trainer
from synthetic.checkpoints import tiny_model

IDS = torch.arange(4, 24).view(2, 10)
ITEMS = [{"prompt": "abc>", "answer": "cab"}] * 8


def adapted(method: str = "adafuse", **options: Any) -> adafuse.Adapted:
    """With experts that do something."""
    small = {"tokenizer": byte_tokenizer(), "rank": 4, "experts": 4, "dropout": 0.0}
    made = adafuse.attach(tiny_model(), method, **small | options).train()
    randomise(made.adapter, seed=1, scale=0.3)
    return made.eval()


@torch.no_grad()
def logits(made: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return made(**inputs or {"input_ids": ids}).logits


def loss_of(made: adafuse.Adapted) -> Tensor:
    return made(input_ids=IDS, labels=IDS, use_cache=False).loss


def test_a_fit_that_is_interrupted_leaves_no_dropout_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapted(dropout=0.5)
    before = logits(made)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.AdapterTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adafuse.fit(made, ITEMS, steps=2)
    torch.testing.assert_close(logits(made), before)


def test_a_fit_between_ones_own_steps_leaves_dropout_on() -> None:
    made = adapted(dropout=0.5).train()
    adafuse.fit(made, ITEMS, steps=1)
    assert made.training and made.model.training
    assert not torch.equal(logits(made), logits(made))


@pytest.mark.parametrize("point", ["first_linear", "embedding", "block0_output", "previous_token"])
def test_embeddings_in_place_of_ids_have_gates_of_their_own(point: str) -> None:
    made = adapted(router_input=point)
    embeddings = made.get_input_embeddings()(IDS)
    logits(made, IDS.flip(1))
    torch.testing.assert_close(logits(made, inputs_embeds=embeddings), logits(made))


@pytest.mark.parametrize("serves", [True, False], ids=["in service", "in training"])
@pytest.mark.parametrize("method", ["adafuse", "pesc"])
def test_a_copy_and_its_original_go_their_own_ways(method: str, serves: bool) -> None:
    made = adapted(method).train(not serves)
    want, other = logits(made), copy.deepcopy(made)
    other.train(serves)
    for of in (made, other):
        torch.testing.assert_close(logits(of), want)
    randomise(other.adapter, 2)
    with torch.no_grad():
        other.adapter.parameters()[0].zero_()
    torch.testing.assert_close(logits(other.detach()), logits(tiny_model()))
    torch.testing.assert_close(logits(made), want)


def test_a_copy_of_the_model_alone_decides_for_itself() -> None:
    made = adapted(router_input="embedding")
    other = copy.deepcopy(made.model)
    logits(made, IDS.flip(1))
    torch.testing.assert_close(logits(other), logits(made))


def by_trainer(model: torch.nn.Module, folder: Path, **options: Any) -> Trainer:
    fixed = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    arguments = TrainingArguments(output_dir=str(folder), learning_rate=1e-2, **fixed | options)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def test_the_librarys_trainer_trains_it_and_knows_its_loss(tmp_path: Path) -> None:
    made = adapted("mixlora")
    before = [parameter.clone() for parameter in made.adapter.parameters()]
    of = by_trainer(made, tmp_path)
    first = of.evaluate()["eval_loss"]
    of.train()
    assert of.evaluate()["eval_loss"] < first
    assert not any(map(torch.equal, before, made.adapter.parameters()))


def test_labels_are_smoothed_as_those_of_the_plain_model(tmp_path: Path) -> None:
    """Trainer compares every token with itself where it does not know a causal LM."""
    made = adapted().train()
    found = [
        by_trainer(model, tmp_path, label_smoothing_factor=0.1).evaluate()["eval_loss"]
        for model in (made, made.model)
    ]
    assert found[0] == pytest.approx(found[1])


def test_training_begins_whoever_has_set_the_flag_already() -> None:
    """torch.compile's wrapper does, before it asks the module; dropout would be off, and static LoRA not trained."""
    made = adapted("pesc", dropout=0.5)
    torch.compile(made, backend="eager").train()
    assert not torch.equal(logits(made), logits(made))
    linears = [made.adapter.sites[path] for path in made.adapter.statics()]
    assert linears and all(site.training and not site.static_merged for site in linears)
    loss_of(made).backward()
    made.model.eval()
    made.train()
    assert not torch.equal(logits(made), logits(made))


def test_what_is_trained_besides_stays_so() -> None:
    made = adapted().train()
    head, frozen = (
        made.lm_head.weight.requires_grad_(True),
        made.adapter.parameters()[0].requires_grad_(False),
    )
    with made.disable_adapter():
        pass
    made.eval().train()
    assert head.requires_grad and not frozen.requires_grad


def test_nothing_is_trained_in_service() -> None:
    """Its gradients would be dropped, or be those of the weights with the static LoRA in them."""
    made = adapted("pesc").train()
    for loss in (loss_of(made), loss_of(made.eval())):
        made.eval()
        with pytest.raises(ValueError, match=r"call train\(\) before forward and backward"):
            loss.backward()


def test_experts_that_change_in_service_are_not_decoded_as_they_were() -> None:
    made, other = adapted(), adapted()
    made.model.load_state_dict(other.model.state_dict())
    for decode in (made.generate, made.model.generate, made):
        with pytest.raises(ValueError, match=r"call use\(\)"):
            decode(IDS)
    made.use().generate(IDS, max_new_tokens=2)


def test_a_model_that_is_cast_in_training_keeps_its_routers() -> None:
    made = adapted().train()
    weights = [router.weight.clone() for router in made.adapter.routers().values()]
    made.model.to(torch.bfloat16)
    assert made.dtype == torch.bfloat16 and loss_of(made).isfinite()
    torch.testing.assert_close([router.weight for router in made.adapter.routers().values()], weights)


def test_what_training_in_half_precision_loses_is_said(recwarn: pytest.WarningsRecorder) -> None:
    made = adapted()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="experts in torch.bfloat16 lose steps"):
        made.to(torch.bfloat16).train()


def test_a_generation_config_that_is_set_is_used() -> None:
    made = adapted()
    made.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert made.generate(input_ids=IDS).shape == (2, 13)


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_a_second_thread_is_refused_what_would_take_the_gates_of_the_first(run: str) -> None:
    """It comes while the first one is in its second block."""
    made, said = adapted(), []
    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: logits(made),
        "generate": lambda: made.generate(IDS, max_new_tokens=2),
    }

    def second() -> None:
        try:
            logits(made, IDS.flip(1))
        except ValueError as error:
            said.append(str(error))

    def meanwhile(*_: object) -> None:
        if threading.get_ident() == first:
            other = threading.Thread(target=second)
            other.start()
            other.join()

    want, first = ways[run](), threading.get_ident()
    handle = made.model.model.layers[1].register_forward_pre_hook(meanwhile)
    torch.testing.assert_close(ways[run](), want)
    handle.remove()
    assert said and all("take turns" in one for one in said)
    torch.testing.assert_close(ways[run](), want)
