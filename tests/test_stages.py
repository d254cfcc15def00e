"""The main job as a user runs it: a local model folder through train, evaluate and latency, by the command line."""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adafuse import archive, cell, locking, membership, records, stages
from adafuse.model import backbone
from adafuse.records import Record
from adafuse.training import stage
from synthetic.configurations import ROOT, compose
from synthetic.scripts import ALWAYS_COUNTED, call

# every stage small enough for a test, none left out
QUICK = [
    "train.steps=6",
    "train.batch=4",
    "train.save_every_steps=2",
    "latency.rounds=2",
    "latency.check_tokens=8",
    "context=8",
    "data.families=[copy,majority]",
    "data.train_items=16",
    "data.validation_items=4",
    "data.test_items=4",
    "experts.count=4",
    "experts.rank=2",
    "device=cpu",
]
# of experiment=own_model: a backbone alone, plain LoRA, and a router
FEW = [
    "~hydra.callbacks.summary",
    "method=base,lora,adafuse",
    "arms.run=[base,base_again,lora_dense,adafuse_gather,adafuse_switch]",
]


def load(runs: Path) -> list[Record]:
    found = archive.load([runs / "records"])
    assert not found.left_out
    return found.records


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama checkpoint with its tokenizer, as a user would have one on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("own") / "my-llama"
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(folder)
    backbone.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(own_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `experiment=own_model` leaves."""
    runs = tmp_path_factory.mktemp("runs")
    job = ["experiment=own_model", f"model.path={own_model}", f"runs_dir={runs}", *QUICK, *FEW]
    command = [sys.executable, "-c", ALWAYS_COUNTED, *job]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


def test_a_local_model_is_trained_evaluated_and_timed(finished: Path) -> None:
    done = load(finished)
    assert {record.run["task"] for record in done} == {"train", "evaluate", "latency"}
    assert all(record.status == "ok" for record in done), [r.of("error") for r in done]
    latency = next(record for record in done if record.run["task"] == "latency")
    assert all(line["passed"] for line in latency.of("check")) and latency.of("block")
    evaluated = [record for record in done if record.run["task"] == "evaluate"]
    assert all(len(line["correct"]) == 4 for record in evaluated for line in record.of("items"))
    assert sorted((finished / "adapters").glob("*/expert_03/adapter_model.safetensors"))


def test_what_the_experiment_consists_of_is_written_down(finished: Path) -> None:
    rows = membership.read(finished / "records" / membership.FILE)
    assert {row.record for row in rows} == {record.run["config_hash"] for record in load(finished)}
    assert {(row.experiment, row.profile) for row in rows} == {("own_model", "cpu")}
    lora = [row for row in rows if row.overrides.startswith("task=evaluate method=lora model.path=")]
    assert sorted(row.task for row in lora) == ["evaluate", "train"]
    assert "runs_dir" not in lora[0].overrides and "device" not in lora[0].overrides


def test_records_and_folders_of_a_former_name_are_used(
    finished: Path, own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version of this code left them: other hashes in the names, the headers and the manifest."""
    runs = shutil.copytree(finished, tmp_path / "runs")
    job = ["experiment=own_model", f"model.path={own_model}", f"runs_dir={runs}", *QUICK]
    (runs / "records" / membership.FILE).unlink()
    configs = [compose(*job, f"task={task}", "method=lora") for task in ("train", "evaluate")]
    for config in configs:
        (former, *_) = cell.former_hashes(config)
        old = cell.record_path(config).read_bytes().replace(cell.cell_hash(config).encode(), former.encode())
        body = old.rpartition(records.SEAL)[0]
        path = cell.record_path(config)
        path.with_name(path.name.replace(cell.cell_hash(config), former)).write_bytes(sealed(body))
        path.unlink()
    now = cell.adapter_dir(configs[0], configs[0].method)
    now.rename(now.with_name(now.name[:-12] + cell.former_hashes(configs[0])[0]))
    data = cell.data_dir(configs[0])
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["recipe"]["text"] = f"2 of Python {platform.python_version()}"
    (data / "manifest.json").write_text(json.dumps(manifest))
    data.rename(data.with_name(data.name[:-12] + cell.content_hash(manifest["recipe"])))
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}

    assert stages.run(configs[1], "python scripts/run.py method=lora") == "skipped"
    rows = membership.read(runs / "records" / membership.FILE)
    assert {(row.task, row.record) for row in rows} == {
        (c.task.name, cell.former_hashes(c)[0]) for c in configs
    }
    other = compose(*job, "task=evaluate", "method=lora", "evaluate_strategy=gather")
    assert stages.run(other, "python scripts/run.py") == "done"
    said = capsys.readouterr().out
    assert "train: " not in said and said.count("done already") == 2, "the adapter is there"
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert after == before, "nothing was renamed, nothing written again"


def sealed(body: bytes) -> bytes:
    return body + records.SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def test_called_again_it_finds_everything_done(finished: Path, own_model: Path, capfd) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.jsonl")}
    job = ["experiment=own_model", f"model.path={own_model}", f"runs_dir={finished}", *QUICK]
    job += [FEW[0], "method=adafuse,lora", FEW[2]]
    again = call(capfd, *job)
    assert again.returncode == 0 and again.stdout.count("done already") == 3, again
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.jsonl")} == before


def test_a_killed_training_goes_on_where_it_was(own_model: Path, tmp_path: Path) -> None:
    job = ["task=train", "method=adafuse", f"model.path={own_model}", f"runs_dir={tmp_path}", *QUICK]
    job += ["train.steps=120", "train.save_every_steps=10"]
    command = [sys.executable, "scripts/run.py", *job]
    victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("adapters/*.checkpoints/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not list((tmp_path / "records").rglob("*.jsonl")), "an unfinished cell has no record of that name"
    assert stages.run(compose(*job), "python scripts/run.py") == "done"
    (record,) = load(tmp_path)
    assert record.status == "ok" and record.of("artifact")[0]["resumed_from_step"] >= 10
    assert record.of("loss")[-1]["step"] > 110
    assert not list(tmp_path.glob("adapters/*.checkpoints")), "checkpoints go when the result is saved"


def test_a_fit_names_the_backbone_it_stands_on_and_stands_on_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "HELD_OUT_TOKENS", 1024)
    few = ["pretrain.steps=2", "pretrain.warmup_steps=1", "pretrain.batch=2", "pretrain.max_length=32"]
    job = ["task=train", "method=lora", f"runs_dir={tmp_path}", *few, *QUICK]
    assert stages.run(compose(*job), "python scripts/run.py") == "done"
    fitted = {record.run["task"]: record for record in load(tmp_path)}
    written = fitted["pretrain"].of("artifact")[0]["sha256"]
    assert [line["sha256"] for line in fitted["train"].of("backbone")] == [written]
    (weights,) = tmp_path.glob("backbones/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is not what .* describes"):
        stages.run(compose(*job, "seed=1"), "python scripts/run.py")


def test_a_job_waits_for_the_one_that_makes_what_it_needs(
    finished: Path, own_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one, which holds the lock of its record, trains the adapter that this one evaluates."""
    runs = shutil.copytree(finished, tmp_path / "runs")
    job = ["experiment=own_model", "method=adafuse", f"model.path={own_model}", f"runs_dir={runs}", *QUICK]
    path = cell.record_path(compose(*job, "task=train"))
    trained = path.read_bytes()
    path.unlink()
    held = locking.lock(records.partial_path(path))

    waits: list[Path] = []
    wait = stages.wait_for_writer
    monkeypatch.setattr(stages, "wait_for_writer", lambda partial: (waits.append(partial), wait(partial)))

    def train() -> None:
        while not waits:
            time.sleep(0.01)
        time.sleep(0.2)
        os.write(held, trained)
        waits[0].rename(path)
        locking.unlock(held)

    other = threading.Thread(target=train, daemon=True)
    other.start()
    evaluation = compose(*job, "task=evaluate", "evaluate_strategy=loop")
    assert stages.run(evaluation, "python scripts/run.py") == "done"
    other.join()
    assert waits == [records.partial_path(path)], "once, until the other one is done"
    assert path.read_bytes() == trained


def test_a_removed_adapter_is_trained_again(finished: Path, own_model: Path) -> None:
    job = [
        "experiment=own_model",
        "task=train",
        "method=lora",
        f"model.path={own_model}",
        f"runs_dir={finished}",
    ]
    (folder,) = (finished / "adapters").glob("*-lora-*")
    shutil.rmtree(folder)
    assert stages.run(compose(*job, *QUICK), "python scripts/run.py") == "done"
    assert (folder / "router_config.json").is_file()


def test_want_of_room_is_one_line_whatever_the_library_calls_it(tmp_path: Path, monkeypatch) -> None:
    def no_room(config, record) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def no_memory(config, record) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\n  frame #0"
        )

    def a_bug(config, record) -> None:
        raise RuntimeError("something else")

    config = compose("task=layer", f"runs_dir={tmp_path}")
    monkeypatch.setitem(stages._STAGES, config.task, no_room)
    with pytest.raises(OSError, match="No space left on device; make room") as error:
        stages.run(config, "test")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(stages._STAGES, config.task, no_memory)
    with pytest.raises(OSError, match="task=layer needs more memory than there is: choose smaller") as error:
        stages.run(config, "test")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(stages._STAGES, config.task, a_bug)
    with pytest.raises(RuntimeError, match="something else"):
        stages.run(config, "test")


def test_what_failed_is_said_on_the_screen(tmp_path: Path, monkeypatch, capsys) -> None:
    """An arm's failure is a record, and whoever ran the cell need not look there."""
    config = compose("task=layer", f"runs_dir={tmp_path}")
    monkeypatch.setitem(
        stages._STAGES, config.task, lambda _, record: record.fail("arm base", RuntimeError("no memory"))
    )
    assert stages.run(config, "test") == "failed"
    assert capsys.readouterr().err == "error: arm base: RuntimeError: no memory\n"


def test_the_header_says_what_made_the_record(tmp_path: Path) -> None:
    config = compose("task=latency", "seed=3", "replicate=2")
    fields = stages.run_fields(config, "run.py task=latency", "table1")
    assert set(records.FIELDS["run"]) <= set(fields) | {"schema"}
    assert fields["config_hash"] == cell.cell_hash(config)
    assert (fields["seed"], fields["replicate"], fields["experiment"]) == (3, 2, "table1")
    assert fields["config"]["model"]["dtype"] == "float32"
    json.dumps(fields)
    with records.open_record(tmp_path / "cell.jsonl", fields):
        pass
    assert records.read(tmp_path / "cell.jsonl").run["command"] == "run.py task=latency"


def test_what_others_are_built_on_is_not_another_pythons(tmp_path: Path) -> None:
    """A finished fit of another Python's text is no fit of this one; a finished evaluation of it is published."""
    for task, there in (("train", False), ("evaluate", True)):
        config = compose(f"task={task}", "method=lora", f"runs_dir={tmp_path}")
        folder = cell.adapter_dir(config, config.method)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "router_config.json").write_text("{}")
        other = cell.former_hashes(config)[-1]
        path = cell.record_path(config)
        path = path.with_name(path.name.replace(cell.cell_hash(config), other))
        with records.open_record(path, stages.run_fields(config, "") | {"config_hash": other}):
            pass
        assert (stages.finished(config) == path) is there


def test_equal_cells_of_one_command_run_once_well_or_not(tmp_path: Path, monkeypatch, capsys) -> None:
    config, ran = compose("task=layer", f"runs_dir={tmp_path}"), []

    def fails(config, record) -> None:
        ran.append(config)
        record.fail("layer", RuntimeError("no memory"))

    monkeypatch.setitem(stages._STAGES, config.task, fails)
    monkeypatch.setenv(stages.COMMAND, "one")
    assert [stages.run(config, "test") for _ in range(2)] == ["failed"] * 2
    assert len(ran) == 1 and capsys.readouterr().err.count("no memory") == 1
    # as if the clock had been set back meanwhile
    later = time.time() + 3600
    os.utime(cell.record_path(config), (later, later))
    monkeypatch.setenv(stages.COMMAND, "two")
    assert stages.run(config, "test") == "failed" and len(ran) == 2, "the next command tries again"


def test_a_record_says_what_its_checkpoint_is_stored_in(own_model: Path, tmp_path: Path, monkeypatch) -> None:
    config = compose("task=layer", f"model.path={own_model}", f"runs_dir={tmp_path}", "experts.rank=2")
    monkeypatch.setitem(stages._STAGES, config.task, lambda config, record: None)
    stages.run(config, "test")
    (record,) = load(tmp_path)
    assert record.of("checkpoint") == [{"kind": "checkpoint", "path": str(own_model), "stored_in": "float32"}]
