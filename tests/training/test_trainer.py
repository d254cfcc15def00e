"""A fit learns, routers learn from the balance loss, and an interrupted fit ends where an unbroken one does."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adafuse.config import Config
from adafuse.training import trainer
from adafuse.training.validation import validate
from synthetic.configurations import GEOMETRY, compose
from synthetic.training import knobs, rows, train


def test_every_method_learns_and_leaves_the_backbone_alone(
    variant: Config, tiny_llama, tmp_path: Path
) -> None:
    model = tiny_llama()
    clean = {name: p.clone() for name, p in model.named_parameters()}
    adapter, lines = train(model, variant, tmp_path, knobs(steps=30, save_every_steps=30))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())
    found = validate(model, adapter, {"words": rows(10)}, batch=4)
    assert found.loss < lines[0]["loss"]
    assert len(found.routing) == len(adapter.routers())


def test_a_fit_that_is_interrupted_and_resumed_ends_the_same(tiny_llama, tmp_path: Path) -> None:
    config = compose(*GEOMETRY, "method=adafuse", "method.dropout=0.1")
    unbroken, _ = train(tiny_llama(), config, tmp_path / "unbroken", knobs())

    class Killed(Exception):
        pass

    class Kill(trainer.Bar):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise Killed

    original, trainer.Bar = trainer.Bar, Kill
    with pytest.raises(Killed):
        train(tiny_llama(), config, tmp_path / "broken", knobs())
    trainer.Bar = original
    assert trainer.last_complete(tmp_path / "broken").endswith("checkpoint-4")
    resumed, _ = train(tiny_llama(), config, tmp_path / "broken", knobs())
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_fit_that_was_killed_behind_its_last_checkpoint_trains_no_step_more(
    tiny_llama, tmp_path: Path
) -> None:
    config = compose(*GEOMETRY, "method=adafuse", "method.dropout=0.1")
    whole, lines = train(tiny_llama(), config, tmp_path, knobs())
    assert trainer.last_complete(tmp_path).endswith(f"checkpoint-{knobs().steps}")
    again, said = train(tiny_llama(), config, tmp_path, knobs())
    assert said == lines
    assert all(map(torch.equal, again.parameters(), whole.parameters()))


def checkpoints(folder: Path, *steps: int) -> None:
    """As the library leaves them, as far as files go."""
    for step in steps:
        own = folder / f"checkpoint-{step}"
        own.mkdir(parents=True)
        torch.save({"step": torch.ones(1000)}, own / "optimizer.pt")
        save_file({"weight": torch.ones(1000)}, own / "router.safetensors")
        (own / "trainer_state.json").write_text("{}")


def test_a_checkpoint_that_was_cut_short_is_not_resumed(tmp_path: Path) -> None:
    checkpoints(tmp_path, 4)
    (tmp_path / "checkpoint-8").mkdir()
    assert trainer.last_complete(tmp_path) == str(tmp_path / "checkpoint-4")
    assert trainer.last_complete(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["optimizer.pt", "router.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_gone_on_from(
    name: str, keep: float, tmp_path: Path, capsys
) -> None:
    checkpoints(tmp_path, 4, 8)
    file = tmp_path / "checkpoint-8" / name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    assert trainer.last_complete(tmp_path) == str(tmp_path / "checkpoint-4")
    said = capsys.readouterr().err
    assert str(file) in said and said.count("\n") == 1
    assert (tmp_path / "damaged-checkpoint-8" / name).is_file()
    assert trainer.last_complete(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not capsys.readouterr().err


def test_the_balance_loss_reaches_the_router(tiny_llama, tmp_path: Path) -> None:
    """Same data, same seed: with the coefficient the routers end elsewhere, and better balanced."""
    ends = []
    for coefficient in (0.0, 10.0):
        config = compose(
            *GEOMETRY, "method=adafuse", f"method.balance_coefficient={coefficient}", "method.dropout=0"
        )
        _, lines = train(
            tiny_llama(), config, tmp_path / str(coefficient), knobs(steps=30, save_every_steps=30)
        )
        ends.append(lines[-1]["balance_loss"])
    assert ends[1] < ends[0]


def test_the_balance_loss_is_not_lost_in_reentrant_checkpointing(tiny_llama, tmp_path: Path) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=mola")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="balance loss without a gradient: say use_reentrant=False"):
        train(model, config, tmp_path, knobs(steps=1))


def test_accumulated_micro_batches_weigh_the_balance_loss_like_one_batch(tiny_llama, tmp_path: Path) -> None:
    config = compose(*GEOMETRY, "method=adafuse", "method.balance_coefficient=1.0", "method.dropout=0")
    _, whole = train(tiny_llama(), config, tmp_path / "whole", knobs(steps=1, batch=8))
    _, shares = train(tiny_llama(), config, tmp_path / "shares", knobs(steps=1, batch=4, accumulation=2))
    assert shares[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.02)


def test_the_first_loss_that_is_no_number_is_an_error_that_names_its_step(tiny_llama, tmp_path: Path) -> None:
    config = compose(*GEOMETRY, "method=lora", "method.dropout=0")

    class Break(trainer.Bar):
        def on_step_begin(self, args, state, control, model, **kwargs):
            # its mean over 2 steps is logged at step 6, a checkpoint written at 8
            if state.global_step == 4:
                model.lm_head.weight.data[3, 3] = float("nan")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as refusal:
        patch.setattr(trainer, "Bar", Break)
        patch.setattr(trainer, "LOG_LINES", 4)
        train(tiny_llama(), config, tmp_path, knobs(steps=12))
    assert str(refusal.value) == "the loss of step 5 is not finite: lower the learning rate, which is 0.01"
    assert trainer.last_complete(tmp_path).endswith("checkpoint-4")


def test_no_checkpoint_is_written_after_it(tiny_llama, tmp_path: Path) -> None:
    """The same command would go on from it, and find no number wrong."""
    model = tiny_llama()
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="the loss of step 1 is not"):
        patch.setattr(trainer, "LOG_LINES", 1)
        train(model, compose(*GEOMETRY, "method=lora"), tmp_path, knobs(steps=12))
    assert trainer.last_complete(tmp_path) is None


def test_harder_rows_at_the_end_are_no_divergence(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    """Two steps that change nothing, on rows of which some cost more: in one order or the other the loss rises."""
    monkeypatch.setattr(trainer, "DIVERGED", 1.0)
    few = knobs(steps=2, batch=1, learning_rate=1e-9)
    pair = sorted(rows(), key=lambda row: len(row["input_ids"]))[:: len(rows()) - 1]
    rose = []
    for seed in range(4):
        model = tiny_llama(initializer_range=0.6).requires_grad_(True)
        losses = trainer.fit(model, pair, few, tmp_path / str(seed), seed=seed).losses
        rose.append(losses[1]["loss"] > losses[0]["loss"] > math.log(260))
    assert any(rose)


def test_a_fit_that_ends_knowing_less_than_nothing_has_diverged(tiny_llama, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the fit diverged: .* has 5.56; lower the learning rate, which is 100"
    ):
        trainer.fit(tiny_llama().requires_grad_(True), rows(), knobs(learning_rate=100.0), tmp_path)


@pytest.mark.parametrize("name", ["adafuse", "lora"])
def test_a_backbone_in_half_precision_stays_as_it_is_and_its_adapter_is_in_fp32(
    name: str, tiny_llama, tmp_path: Path
) -> None:
    model = tiny_llama().bfloat16()
    clean = {name: p.clone() for name, p in model.named_parameters()}
    adapter, lines = train(model, compose(*GEOMETRY, f"method={name}"), tmp_path, knobs(steps=30))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    found = validate(model, adapter.to_dtype(torch.bfloat16), {"words": rows(10)}, batch=4)
    assert found.loss < lines[0]["loss"]


def test_a_backbone_that_is_trained_itself_is_trained_in_fp32(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama().bfloat16().requires_grad_(True)
    fitted = trainer.fit(model, rows(32), knobs(steps=10), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert fitted.losses[-1]["loss"] < fitted.losses[0]["loss"]
