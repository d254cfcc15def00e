"""The mirror takes a finished record, works without an account, and stays off unless asked for."""

import sys

import pytest

from adafuse.records import read
from adafuse.tracking import run_settings, summary, track
from synthetic import runs


@pytest.fixture
def record_path(tmp_path):
    return runs.write_latency(tmp_path / "records", plain={"runs_dir": str(tmp_path / "runs")})


def test_off_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path / "absent.jsonl", "off")


def test_unknown_tracker_is_refused(record_path):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow': choose"):
        track(record_path, "mlflow")


def test_without_wandb_the_error_says_so(record_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs wandb"):
        track(record_path, "wandb")


def test_only_finished_records(tmp_path):
    partial = runs.write_unfinished(tmp_path / "latency" / "cut.jsonl")
    with pytest.raises(ValueError, match="unfinished"):
        track(partial, "wandb")


def test_names_and_summary(record_path):
    record = read(record_path)
    settings = run_settings(record)
    assert settings["group"] == "latency" and settings["name"] == record.run["cell_id"]
    assert settings["tags"][:3] == ["tiny", "cpu", "base"]
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


def test_offline_run_without_an_account(record_path, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    before = record_path.read_bytes()
    import wandb

    # as a trainer leaves it
    wandb.init(project="trainer", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    track(record_path, "wandb")
    runs = list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 1000
    assert wandb.run is None
    assert record_path.read_bytes() == before
