"""scripts/run.py: one line for a mistake, the right exit status, and no heavy import where nothing has to run."""

import os
import re
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from hydra.types import RunMode

from adafuse import locking, membership, records
from adafuse.config import Config
from synthetic.configurations import ROOT, compose
from synthetic.scripts import LAYER, call, finished, run, script

MISTAKES = [
    (["train.stepz=1"], "Key 'stepz' not in 'Fit'"),
    (["+train.stepz=1"], "there is no key train.stepz"),
    (["++arms.table.base.speed=1"], "there is no key arms.table.base.speed"),
    (["train.steps=many"], "could not be converted to Integer"),
    (["method.routing=tokens"], "expected one of [none, layerwise, blockwise, token]"),
    (["model=nonesuch"], "choose from ['llama2_7b', "),
    (["experiment=nonesuch"], "'training_speed']"),
    (["train.steps"], "missing EQUAL"),
    (["arms.name=/a & b"], "quote"),
    (["model.path=/a, b & (c)"], "model.path=/a, b & (c) is not a folder"),
    (["model.path=~/nonesuch"], f"model.path={Path.home()}/nonesuch is not a folder"),
    (["model=llama3_8b", "model.path=models/llama3_8b"], "scripts/prepare.py makes smollm2, "),
    (["model.dtype=auto"], "model.dtype=auto is that of a checkpoint"),
    (["experiment=own_model"], "add model.path=FOLDER"),
    (["experiment=own_model", "model.path=/tmp", "data.path=/nonesuch"], "/tmp has no config.json"),
    (["seed=0,1"], "--multirun"),
    (["arms.run=[base,nope]"], "unknown arm 'nope'"),
    (["method=pesc", "evaluate_strategy=switch"], "not linear in the weight"),
    (["methods.mola.rank=3"], "use method=mola"),
    (["suite.tasks=[nonesuch]"], "unknown task 'nonesuch'"),
    (["data.families=[copy]", "suite.tasks=[sort]"], "has no data"),
    (["model.path=/nonesuch"], "is not a folder"),
    (["model=llama2_7b"], "on random weights means nothing"),
    (["experiment=table2", "method=nonesuch"], "conf/method/nonesuch.yaml"),
    (["seed=-1"], "seed=-1 must be between 0 and 2147483647"),
    (["train.steps=" + "9" * 400], "must be between 0 and 2147483647"),
    (["train.learning_rate=nan"], "train.learning_rate=nan must be between"),
    (["layer.ranks=[16,-4]"], "layer.ranks=-4 must be between"),
    (["data.validation_items=0"], "data.validation_items=0 leaves nothing"),
    (["pretrain.batch=2000000000"], "more than 2147483647 tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path, capfd) -> None:
    done = call(capfd, f"runs_dir={tmp_path / 'runs'}", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for task in ("layer", "kernel", "train", "latency"):
        done = call(capfd, f"runs_dir={tmp_path}", f"task={task}", "device=cuda")
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and "device=cuda, and torch finds none on this machine" in line
    assert not list(tmp_path.rglob("*.jsonl*"))


HIDDEN = "hf_" + "abCD0123" * 4
SECRETS = [
    (["model.name=${oc.env:HF_TOKEN}"], "model.name=*** is a secret by its name, HF_TOKEN"),
    (["runs_dir=RUNS/${oc.env:MYKEY}"], "by its name, MYKEY"),
    (["model.name='${oc.env:DB_PASSWORD,none}'"], "by its name, DB_PASSWORD"),
    (["-m", "seed=0,1", "data.name=${oc.env:AWS_SECRET}"], "by its name, AWS_SECRET"),
    ([f"data.name={HIDDEN}"], "data.name=*** is a secret by its form"),
    ([f"model.path=RUNS/{HIDDEN}/x"], "by its form"),
    (["model.name=s" + "k-proj-" + "x9" * 12], "by its form"),
    (["data.name=" + "0123456789abcdef" * 2 + "01234567"], "by its form"),
    (["data.path=https://me:pass@example.org/x"], "by its form"),
    (["data.name=in-the-environment"], "what a secret of the environment is"),
]


@pytest.mark.parametrize(("arguments", "message"), SECRETS, ids=[" ".join(a) for a, _ in SECRETS])
def test_a_secret_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "MYKEY", "DB_PASSWORD", "AWS_SECRET"):
        monkeypatch.setenv(name, "in-the-environment")
    given = [argument.replace("RUNS", str(tmp_path)) for argument in arguments]
    done = call(capfd, f"runs_dir={tmp_path / 'runs'}", *given)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert message in line and "in-the-environment" not in line and HIDDEN not in line
    assert not list(tmp_path.iterdir())


def test_a_secret_that_a_file_takes_from_the_environment_is_refused(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INNOCENT", HIDDEN)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndata: {name: '${oc.env:INNOCENT}'}\n"
    )
    done = call(capfd, "--config-dir", str(tmp_path), "experiment=mine", *LAYER, f"runs_dir={tmp_path}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "data.name=*** is a secret by its form" in line and HIDDEN not in line
    assert not list(tmp_path.rglob("records"))


def test_what_looks_like_a_secret_and_is_none_runs() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    membership.refuse_secrets(
        [
            f"model.revision={commit}",
            f"model.path=/cache/models--x/snapshots/{commit}",
            "model.path=models/hf_checkpoint",
            "data.path=risk-averse-questions-of-long-names",
            "latency.check_tokens=64",
            "runs_dir=${oc.env:SCRATCH}/runs",
        ]
    )


def test_a_misspelt_key_in_a_file_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ntrain: {stepz: 1}\n")
    done = run("--config-dir", str(tmp_path), "experiment=mine")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "experiment/mine" in line and "stepz" in line


def test_a_profile_that_has_no_choice_is_one_line(tmp_path: Path, capfd) -> None:
    (tmp_path / "profile").mkdir()
    cpu = (ROOT / "conf/profile/cpu.yaml").read_text()
    (tmp_path / "profile/mine.yaml").write_text(cpu.replace("profile: cpu", "profile: mine"))
    done = call(capfd, "--config-dir", str(tmp_path), "experiment=table2", "profile=mine")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "profile=mine has no value here: add it beside cpu, gpu, real, paper" in line


def test_cfg_shows_the_configuration_and_runs_nothing(capfd) -> None:
    done = call(capfd, "experiment=table6", "batch=2", "--cfg", "job")
    assert done.returncode == 0
    shown = yaml.safe_load(done.stdout)
    assert (shown["task"], shown["batch"], shown["arms"]["name"]) == ("latency", 2, "paper")


def test_help_lists_the_groups(capfd) -> None:
    done = call(capfd, "--help")
    assert done.returncode == 0
    assert all(
        f"\n{group}: " in done.stdout for group in ("model", "method", "arms", "experiment", "profile")
    )


def test_a_finished_cell_is_left_alone_at_once_and_without_torch(tmp_path: Path) -> None:
    path = finished(tmp_path, *LAYER)
    before = path.read_bytes()
    start = time.perf_counter()
    done = run(f"runs_dir={tmp_path}", *LAYER, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"done already: {path}\n"
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "lm_eval", "pandas", "matplotlib", "numpy", "pyarrow"}
    rows = membership.read(tmp_path / "records" / membership.FILE)
    assert [(row.experiment, row.task, row.overrides) for row in rows] == [("", "layer", "task=layer")]
    # under 1 s on an idle machine
    assert time.perf_counter() - start < 10
    assert path.read_bytes() == before


def test_a_sweep_goes_on_after_a_job_that_cannot_work(tmp_path: Path, capfd) -> None:
    finished(tmp_path, *LAYER, "method=mola")
    strategies = "evaluate_strategy=switch,dense,rebase"
    sweep = ("-m", "hydra/launcher=basic", "method=mola", strategies)
    done = call(capfd, f"runs_dir={tmp_path}", *LAYER, *sweep)
    assert done.returncode == 1
    assert done.stdout.count("done already") == 1
    assert done.stderr.count("error: ") == 2 and "Traceback" not in done.stderr
    assert "(job: " in done.stderr and "evaluate_strategy=rebase" in done.stderr


def test_a_damaged_record_is_one_line_and_stays_as_it_is(tmp_path: Path, capfd) -> None:
    path = finished(tmp_path, *LAYER)
    path.write_bytes(path.read_bytes()[:-20])
    spoilt = path.read_bytes()
    done = call(capfd, f"runs_dir={tmp_path}", *LAYER)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert str(path) in line and "delete it and run again" in line
    assert path.read_bytes() == spoilt


def test_a_second_process_on_the_same_cell_waits_and_finds_it_done(tmp_path: Path, capfd) -> None:
    path = finished(tmp_path, *LAYER)
    content = path.read_bytes()
    path.unlink()
    held = locking.lock(records.partial_path(path))

    def finish() -> None:
        time.sleep(2)
        os.write(held, content)
        records.partial_path(path).rename(path)
        locking.unlock(held)

    other = threading.Thread(target=finish, daemon=True)
    other.start()
    done = call(capfd, f"runs_dir={tmp_path}", *LAYER)
    other.join()
    assert done.returncode == 0, done.stderr
    assert f"waiting for another process that writes {path}" in done.stdout
    assert done.stdout.endswith(f"done already: {path}\n") and path.read_bytes() == content


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as it is inside a job of its own, with the offline variables unset."""
    module = script("run")
    chosen = SimpleNamespace(
        overrides=SimpleNamespace(task=["seed=3"]),
        runtime=SimpleNamespace(choices={"experiment": "table2"}),
        mode=RunMode.RUN,
    )
    monkeypatch.setattr(module, "HydraConfig", SimpleNamespace(get=lambda: chosen))
    monkeypatch.setattr(module, "build", lambda composed, overrides: composed)
    for name in module.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    return module


def test_what_the_stages_are_told(in_a_job: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Config, str, str]] = []
    monkeypatch.setattr(in_a_job.stages, "run", lambda *told: seen.append(told) or "done")
    config = compose()
    assert in_a_job.run_cell(config) == 0
    assert seen == [(config, "python scripts/run.py seed=3", "table2")]


@pytest.mark.parametrize(("outcome", "status"), [("done", 0), ("skipped", 0), ("failed", 1)])
def test_exit_status(
    in_a_job: ModuleType, monkeypatch: pytest.MonkeyPatch, outcome: str, status: int
) -> None:
    monkeypatch.setattr(in_a_job.stages, "run", lambda *_: outcome)
    assert in_a_job.run_cell(compose()) == status


def test_the_unforeseen_keeps_its_traceback(
    in_a_job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(in_a_job.stages, "run", fail)
    assert in_a_job.run_cell(compose()) == 1
    assert "Traceback" in (said := capsys.readouterr().err) and "a bug of ours" in said


def test_libraries_stay_offline_only_where_nothing_is_fetched(
    in_a_job: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_job.stay_offline(compose("model=llama2_7b", "model.weights=hub"))
    in_a_job.stay_offline(compose("suite=paper", "suite.path=null"))
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    in_a_job.stay_offline(compose())
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_DATASETS_OFFLINE"]) == ("0", "1")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
