"""What a sweep is looked at before its first job: its keys as Hydra reads them, whatever a path holds."""

import pytest
from omegaconf import OmegaConf

from adafuse.config import Dtype
from hydra_plugins import first_look
from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import compose


def sweep(*overrides: str, **params: str) -> OmegaConf:
    return OmegaConf.create(
        {"hydra": {"sweeper": {"params": params}, "overrides": {"task": list(overrides)}}}
    )


def test_jobs_are_those_that_hydra_runs() -> None:
    config = sweep("method=lora,base", "model.path='/a, b/(c)'", task="evaluate,latency", method="adafuse")
    assert list(first_look.jobs(config)) == [
        ["task=evaluate", "method=lora", "model.path='/a, b/(c)'"],
        ["task=evaluate", "method=base", "model.path='/a, b/(c)'"],
        ["task=latency", "method=lora", "model.path='/a, b/(c)'"],
        ["task=latency", "method=base", "model.path='/a, b/(c)'"],
    ]


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_checkpoints_own_precision_is_for_gpus(stored: str, tmp_path, monkeypatch) -> None:
    import torch

    folder = save(tiny_model().to(getattr(torch, stored)), tmp_path / "checkpoint")
    job = ["experiment=own_model", f"model.path={folder}"]
    for where, expected in (("cpu", "float32"), ("cuda", stored)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        config = compose(*job, f"device={where}")
        assert (config.model.dtype, config.evaluate_dtype) == (Dtype[expected], Dtype[expected])
    assert compose(*job, "device=cpu", f"model.dtype={stored}").evaluate_dtype is Dtype[stored]
