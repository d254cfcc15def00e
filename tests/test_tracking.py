"""The mirror takes a finished record, works without an account, and stays off unless asked for."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adafuse import stages, tracking
from adafuse.records import open_record, read
from adafuse.tracking import run_settings, summary, track
from synthetic import offline, runs
from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import compose


@pytest.fixture
def record_path(tmp_path):
    return runs.write_latency(tmp_path / "records", plain={"runs_dir": str(tmp_path / "runs")})


def test_off_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path / "absent.jsonl", "off")


def test_unknown_tracker_is_refused(record_path):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow': choose"):
        track(record_path, "mlflow")


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_without_the_library_the_error_says_so(library, record_path, no_account, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"needs {library}"):
        track(record_path, library)


def test_only_finished_records(tmp_path):
    partial = runs.write_unfinished(tmp_path / "latency" / "cut.jsonl")
    with pytest.raises(ValueError, match="unfinished"):
        track(partial, "wandb")


def test_names_and_summary(record_path):
    record = read(record_path)
    settings = run_settings(record)
    assert settings["group"] == "latency" and settings["name"] == record.run["cell_id"]
    assert settings["tags"][:3] == ["cpu", "base", "mola"]
    found = summary(record)
    assert found["status"] == "ok" and found["failed_checks"] == 0
    assert found["ms_per_token/mola_loop"] == pytest.approx(12, rel=0.1)


def test_a_block_that_must_not_count_does_not(tmp_path):
    flags = tuple(("mola_loop", number, "others on the device") for number in range(7))
    record = read(runs.write_latency(tmp_path, flags=flags))
    (last,) = [b for b in record.of("block") if b["arm"] == "mola_loop" and b["round"] == 7]
    found = summary(record)
    assert found["ms_per_token/mola_loop"] == last["block_ms"] / last["tokens"]
    base = sorted(b["block_ms"] / 64 for b in record.of("block") if b["arm"] == "base" and b["round"] != 3)
    assert found["ms_per_token/base"] == base[3], "the preempted round is excluded"


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine where nobody has heard of wandb."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(tracking, "_said", set())


def written(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def table(folder: Path, name: str) -> dict[str, Any]:
    (file,) = folder.glob(f"files/media/table/{name}_*.table.json")
    return json.loads(file.read_text())


def test_one_run_a_cell_read_back(record_path, tmp_path, no_account, capsys) -> None:
    before = record_path.read_bytes()
    import wandb

    # as a trainer leaves it
    wandb.init(project="trainer", dir=str(tmp_path), mode="offline", settings=wandb.Settings(silent=True))
    track(record_path, "wandb", {"seed": 0, "arms": ["base"]})
    assert capsys.readouterr().out.count("tracker=wandb: no key here, so runs stay in ") == 1
    (folder,) = written(tmp_path / "runs")
    found = offline.read(folder)
    assert (found.run.run_group, found.run.job_type, found.run.project) == ("latency", "latency", "adafuse")
    assert found.run.display_name == "paper-tiny-b1-r0" and found.run.run_id == "paper-tiny-b1-r0-hash-cpu"
    assert list(found.run.tags) == ["cpu", "base", "mola", "pesc", "moral", "adafuse", "tiny"]
    assert (found.config["arms"], found.config["profile"]) == (["base"], "cpu"), "the cell's own settings"
    assert "runs_dir" not in found.config
    low, middle, high = (found.summary[f"ms_per_token/mola_loop{end}"] for end in ("/low", "", "/high"))
    assert 11 < low < middle < high < 13
    blocks, arms = table(folder, "blocks"), table(folder, "latency")
    assert len(blocks["data"]) == 8 * len(arms["data"]) and blocks["columns"][0] == "arm"
    assert [[row[0], *row[1:4]] for row in arms["data"] if row[0] == "mola_loop"] == [
        ["mola_loop", middle, low, high]
    ]
    assert found.artifacts["record"] == [record_path.name]
    assert wandb.run is None
    assert record_path.read_bytes() == before


def test_what_is_disabled_is_not_taken_for_done(record_path, tmp_path, no_account, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(record_path, "wandb")
    assert not (tmp_path / "runs").exists()
    monkeypatch.delenv("WANDB_MODE")
    track(record_path, "wandb")
    assert len(written(tmp_path / "runs")) == 1


def test_a_second_time_duplicates_nothing(record_path, tmp_path, no_account) -> None:
    for _ in range(2):
        track(record_path, "wandb")
    (folder,) = written(tmp_path / "runs")
    # the cell ran again: another record, the same run
    os.utime(record_path, (time.time() + 5, time.time() + 5))
    time.sleep(1)
    track(record_path, "wandb")
    first, second = map(offline.read, written(tmp_path / "runs"))
    assert first.run.run_id == second.run.run_id
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)], capture_output=True, text=True
    )
    assert "Would sync 1 run(s)" in listed.stderr + listed.stdout, "wandb's own sync takes it"


def test_neither_host_nor_path_leaves_unless_asked_for(tmp_path, no_account, monkeypatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    plain = {"runs_dir": str(tmp_path / "runs"), "model": {"name": "own", "path": str(tmp_path / "model")}}
    record_path = runs.write_latency(tmp_path / "records", plain=plain, command=f"run.py runs_dir={tmp_path}")
    for tracker, count in (("wandb", 0), ("wandb_full", 1)):
        track(record_path, tracker)
        (folder,) = written(tmp_path / "runs")
        found = offline.read(folder)
        (kept,) = [
            text
            for file in (tmp_path / "runs/wandb/data").rglob("tmp*")
            if file.is_file() and (text := file.read_text()).startswith('{"kind": "run"')
        ]
        assert [min(1, text.count(str(tmp_path))) for text in (found.text, kept)] == [count, count]
        assert (found.run.host == "secret-host") == bool(count)
        shutil.rmtree(tmp_path / "runs")


def test_figures_and_traces_go_along(tmp_path, no_account) -> None:
    plain = {"runs_dir": str(tmp_path / "runs")}
    timed = runs.write_latency(tmp_path / "records", plain=plain, experiment="table1")
    track(timed, "wandb")
    (folder,) = written(tmp_path / "runs")
    assert list(folder.glob("files/media/images/figures/*.png"))
    trace = tmp_path / "base.json.gz"
    trace.write_bytes(b"")
    header = runs.run_fields("trace", "traced", runs.config(**plain))
    with open_record(tmp_path / "traced.jsonl", header) as record:
        record.write("artifact", path=str(trace), sha256="", arm="base")
    track(tmp_path / "traced.jsonl", "wandb")
    (folder,) = set(written(tmp_path / "runs")) - {folder}
    assert offline.read(folder).artifacts["trace"] == ["base.json.gz"]


def test_a_fits_curves_are_in_its_own_run_below_runs_dir(tmp_path, no_account, monkeypatch) -> None:
    model = save(tiny_model(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    job = [
        "task=train",
        "method=lora",
        f"model.path={model}",
        f"runs_dir={tmp_path / 'runs'}",
        "tracker=wandb",
    ]
    job += ["data.families=[copy]", "data.train_items=32", "data.validation_items=4", "data.test_items=4"]
    job += ["train.steps=4", "train.warmup_steps=1", "train.batch=2", "train.max_length=64"]
    for _ in range(2):
        stages.run(compose(*job), "python scripts/run.py", "mine")
    (folder,) = written(tmp_path / "runs")
    found = offline.read(folder)
    assert (found.run.run_group, found.run.job_type) == ("mine", "train")
    curve = [line for line in found.history if "train/loss" in line]
    assert [line["train/global_step"] for line in curve] == [1, 2, 3, 4]
    assert all(line["train/grad_norm"] > 0 and "train/learning_rate" in line for line in curve)
    assert found.summary["validation/loss"] > 0
    assert str(tmp_path) not in found.text
    assert not list(tmp_path.glob("wandb")), "no run of the trainer's own"


def test_trackio_is_told_the_same(tmp_path, monkeypatch) -> None:
    """By a stand-in: it is no part of the installation."""
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step=None: calls.append((step, values)), finish=lambda: None)
    library = SimpleNamespace(
        init=lambda **how: (calls.append(how), run)[1],
        Table=lambda columns, data: (columns, data),
        Image=lambda image: image.size,
    )
    monkeypatch.setitem(sys.modules, "trackio", library)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    plain = {"runs_dir": str(tmp_path / "runs")}
    path = runs.write_latency(tmp_path / "records", plain=plain, experiment="table1")
    for _ in range(2):
        track(path, "trackio")
    about, (_, shown), (_, numbers) = calls
    assert (about["project"], about["name"]) == ("adafuse", "paper-tiny-b1-r0")
    assert about["config"]["job_type"] == "latency" and str(tmp_path) not in str(calls)
    assert set(shown) >= {"blocks", "latency"} and any(name.startswith("figures/") for name in shown)
    assert numbers["ms_per_token/base/low"] < numbers["ms_per_token/base"]


def test_whoever_has_logged_in_is_not_kept_offline(no_account, monkeypatch, tmp_path) -> None:
    assert tracking._mode(tmp_path) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert tracking._mode(tmp_path) is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert tracking._mode(tmp_path) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking._mode(tmp_path) is None
