"""The header: names the code, the libraries and the machine, and never needs a GPU or a clone."""

import json

import pytest

from adafuse import machine
from adafuse.config import Task
from adafuse.identity import content_hash, identity
from adafuse.records import FIELDS, open_record, read
from conftest import compose


def test_run_fields_fill_the_header(tmp_path):
    config = compose("task=latency", "seed=3", "replicate=2")
    fields = machine.run_fields(config, Task.latency, "run.py task=latency", "table1")
    assert set(FIELDS["run"]) <= set(fields) | {"schema"}
    assert fields["config_hash"] == content_hash(identity(config, Task.latency))
    assert (fields["seed"], fields["replicate"], fields["experiment"]) == (3, 2, "table1")
    assert fields["config"]["model"]["dtype"] == "float32"
    json.dumps(fields)
    with open_record(tmp_path / "cell.jsonl", fields):
        pass
    assert read(tmp_path / "cell.jsonl").run["command"] == "run.py task=latency"


def test_machine_without_a_gpu():
    found = machine.machine("cpu")
    assert found["name"] == "cpu" and found["gpu"] is None
    assert found["cores"] >= 1 and found["memory_gib"] > 0 and found["cpu"]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "t4"), ("", "gpu")],
)
def test_folder_name(gpu, name):
    assert machine.folder_name(gpu) == name


def test_versions_name_what_can_change_a_number():
    assert {"python", "torch", "transformers", "numpy"} <= set(machine.versions())
