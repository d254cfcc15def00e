"""Several processes on one cell: the same losses, adapter, items and records as one leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adafuse import api, distributed, membership, refusals, stages
from adafuse.adapters import router
from adafuse.adapters.router import Router, routing_losses
from adafuse.config import Normalisation
from adafuse.records import Record, read
from adafuse.training import trainer
from hydra_plugins import isolated_launcher
from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import ROOT, compose

METHODS = ("adafuse", "mola")
# what dropout draws differs between processes
JOB = ["method.dropout=0", "data.families=[copy,majority]", "suite.tasks=[copy,majority]", "suite.batch=2"]
JOB += ["data.train_items=48", "data.validation_items=4", "data.test_items=5", "train.batch=4"]
JOB += ["train.steps=8", "train.warmup_steps=1", "train.save_every_steps=4", "train.max_length=64"]


class Killed(BaseException):
    pass


class Kill(trainer.Bar):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise Killed


def found(runs: Path, task: str, method: str) -> Record:
    """The one record of its cell."""
    (path,) = (runs / "records" / task).glob(f"*-{method}-*.jsonl")
    return read(path)


@pytest.fixture(scope="module")
def model_and_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and what one process leaves of it."""
    model, runs = save(tiny_model(), tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("one")
    for method in METHODS:
        job = ["task=evaluate", f"model.path={model}", *JOB, f"method={method}", f"runs_dir={runs}"]
        stages.run(compose(*job), "python scripts/run.py")
    return model, runs


@pytest.mark.slow
@pytest.mark.parametrize(("by", "methods"), [("DDP", METHODS), ("FSDP", METHODS[:1])])
def test_two_processes_leave_what_one_leaves(
    by: str,
    methods: tuple[str, ...],
    model_and_runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AdaFuse's fit was interrupted and goes on from its checkpoint; MoLA's begins."""
    (model, one), two = model_and_runs, tmp_path / "two"
    job = ["task=evaluate", f"model.path={model}", *JOB]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "Bar", Kill)
        cell = ["task=train", f"model.path={model}", *JOB, "method=adafuse", f"runs_dir={two}"]
        stages.run(compose(*cell), "python scripts/run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "scripts/run.py", "-m"]
    command = [*launch, *job, f"method={','.join(methods)}", f"runs_dir={two}", "hydra/launcher=basic"]
    # as accelerate launch sets them
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(by == "FSDP").lower())
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    halves = done.stdout.count("FSDP: this process holds 23,824 of the backbone's 47,648 numbers")
    assert halves == (len(methods) if by == "FSDP" else 0)
    for method in methods:
        ours, theirs = (found(runs, "train", method) for runs in (two, one))
        assert ours.of("artifact")[0]["resumed_from_step"] == (4 if method == "adafuse" else 0)
        lines = list(zip(ours.of("loss"), theirs.of("loss"), strict=True))
        assert [line["step"] for line, _ in lines] == list(range(1, 9))
        for line, expected in lines:
            assert line.pop("kind") == expected.pop("kind") == "loss"
            assert line == pytest.approx(expected, rel=1e-5)
        assert ours.of("metric")[0]["value"] == pytest.approx(theirs.of("metric")[0]["value"], rel=1e-5)
        ours, theirs = (found(runs, "evaluate", method) for runs in (two, one))
        assert (ours.of("metric"), ours.of("items")) == (theirs.of("metric"), theirs.of("items"))
        assert [line["n"] for line in ours.of("metric")] == [5, 5]
    files = sorted(file.relative_to(two) for file in two.glob("adapters/**/*.safetensors"))
    assert len(files) > len(methods) * 8
    for file in files:
        for name, tensor in load_file(one / file).items():
            torch.testing.assert_close(load_file(two / file)[name], tensor, rtol=1e-4, atol=2e-5)
    described = sorted(file.relative_to(two) for file in two.glob("adapters/**/router_config.json"))
    assert len(described) == len(methods)
    for file in described:
        ours, theirs = (json.loads((runs / file).read_bytes()) for runs in (two, one))
        assert ours["base"] == theirs["base"]
    rows = membership.read(two / "records" / membership.FILE)
    assert len(rows) == len(set(rows)) == 2 * len(methods) + 1
    assert not list(two.glob("adapters/*.checkpoints")) and not list(two.rglob("*.partial"))


def test_routers_are_balanced_over_all_processes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of a batch, each with the other's sums, have its loss, and gradients whose mean is its gradient."""
    gate = Router(16, 4, 2, Normalisation.softmax_topk_renorm)
    whole = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(24) % 5 > 0
    expected, _ = routing_losses([gate(whole)], keep)
    (wanted,) = torch.autograd.grad(expected, gate.weight)
    halves = [(whole[:7], keep[:7]), (whole[7:], keep[7:])]
    sums = [router._sums(gate(part), own).detach() for part, own in halves]
    gradients = []
    for part, own in halves:
        monkeypatch.setattr(distributed, "PROCESSES", 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(sum(sums)))
        loss, _ = routing_losses([gate(part)], own)
        torch.testing.assert_close(loss, expected)
        gradients.append(torch.autograd.grad(loss, gate.weight)[0])
    torch.testing.assert_close(sum(gradients) / 2, wanted)
    assert not torch.allclose(gradients[0], wanted)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_what_splits_trained_parameters_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that nobody has begun by scripts/run.py, or (DeepSpeed) any."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"{name} .*split.* launch with --multi_gpu"):
        distributed.share(4)


def test_what_fsdp_does_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (refusals, distributed):
        monkeypatch.setattr(module, "PROCESSES", 2)
        monkeypatch.setattr(module, "SHARDED", True)
    refusals.refuse_processes(compose("task=train"))
    for job in (["task=pretrain"], ["task=train", "method=full"]):
        with pytest.raises(ValueError, match="FSDP splits a frozen backbone"):
            refusals.refuse_processes(compose(*job))
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="--fsdp_offload_params is not done here: leave it out"):
        refusals.refuse_processes(compose("task=train"))


def test_one_process_is_timed_and_one_cell_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PROCESSES", 2)
    refusals.refuse_processes(compose("task=train"))
    with pytest.raises(ValueError, match="task=latency measures one process: start it without torchrun"):
        refusals.refuse_processes(compose("task=latency"))
    monkeypatch.setattr(isolated_launcher, "PROCESSES", 2)
    with pytest.raises(ValueError, match="2 processes share one cell, and a sweep has several"):
        isolated_launcher.IsolatedLauncher().launch([["seed=0"]], 0)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PROCESSES", 3)
    with pytest.raises(ValueError, match="a batch of 4 rows does not divide over 3 processes"):
        distributed.share(4)


@pytest.mark.skipif("SLURM_JOB_ID" in os.environ, reason="this is a Slurm machine")
def test_slurm_without_srun_is_one_line(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    from synthetic.scripts import call

    monkeypatch.setattr("shutil.which", lambda name: None)
    done = call(capfd, "-m", "task=layer", "hydra/launcher=slurm", f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no srun here") and "hydra/launcher=slurm" in line


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_a_backbone_that_is_spread_or_offloaded_is_refused_by_name(places: dict, tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"spread over devices \(device_map, FSDP\): load it on one"):
        api.load(model)
