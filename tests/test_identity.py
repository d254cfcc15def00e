"""identity.py: a setting that changes a result changes the hash, and one that does not leaves the record shared."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse import cell_names, identity
from adafuse.config import Config, Task
from conftest import ROOT, compose


def hashes(config: Config) -> dict[str, str]:
    return {task.name: identity.content_hash(identity.identity(config, task)) for task in Task}


BASE: dict[str, str] = {}
# arms that stand on trained adapters stand on more settings than those on random factors
TRAINED = "latency.trained_adapters=true"


@pytest.fixture(scope="module", autouse=True)
def _base() -> None:
    BASE.update(hashes(compose(TRAINED)))


# what must be made again after a change, and nothing else
CHANGES = [
    ("seed=1", "train evaluate latency memory trace layer kernel drift"),
    ("model.seed=1", "pretrain train evaluate latency memory trace drift"),
    ("model.shape.hidden_size=64", "pretrain train evaluate latency memory trace layer kernel drift"),
    ("model.dtype=bfloat16", "pretrain train evaluate latency memory trace layer kernel drift"),
    ("model.weights=random", "train evaluate latency memory trace drift"),
    ("pretrain.steps=3", "pretrain train evaluate latency memory trace drift"),
    ("pretrain.save_every_steps=3", ""),
    ("train.steps=3", "train evaluate latency memory trace drift"),
    ("train.save_every_steps=3", ""),
    ("experts.rank=2", "train evaluate latency memory trace drift"),
    ("experts.count=4", "train evaluate latency memory trace layer kernel drift"),
    ("method=mola", "train evaluate drift"),
    ("method.dropout=0.2", "train evaluate latency memory trace drift"),
    ("data=domain", "train evaluate latency memory trace drift"),
    ("data.train_items=50", "train evaluate latency memory trace drift"),
    ("data.level=2", "train evaluate latency memory trace drift"),
    ("suite.limit=3", "evaluate"),
    ("evaluate_dtype=bfloat16", "evaluate"),
    ("evaluate_strategy=switch evaluate_restore=false", "evaluate"),
    ("method.null_expert=true", "train evaluate latency memory trace drift"),
    ("method.router_norm=true", "train evaluate latency memory trace drift"),
    ("method.learning_rate_factor=0.1", "train evaluate latency memory trace drift"),
    ("budget=equal", "latency memory trace"),
    ("evaluate_strategy=gather", "evaluate"),
    ("arms=smoke", "latency memory trace"),
    ("latency.rounds=3", "latency"),
    ("latency.block_tokens=128", "latency memory"),
    ("latency.settle_tokens=5", "latency trace"),
    ("batch=2", "latency memory trace"),
    ("context=32", "latency memory trace drift"),
    ("replicate=1", "latency memory trace layer kernel drift"),
    ("device=cuda", "latency memory trace layer kernel drift"),
    ("layer.runs=10", "layer"),
    ("kernel.replays=3", "kernel"),
    ("kernel.tokens=[1]", "kernel"),
    ("drift.dtype=float16", "drift"),
    ("drift.refresh_every=3", "drift"),
    ("tracker=wandb", ""),
    ("runs_dir=elsewhere", ""),
    (
        "profile=gpu model=tiny experts=all_r4",
        "pretrain train evaluate latency memory trace layer kernel drift",
    ),
    ("experiment=table6", ""),
]


@pytest.mark.parametrize(("overrides", "changed"), CHANGES, ids=[overrides for overrides, _ in CHANGES])
def test_what_a_setting_changes(overrides: str, changed: str) -> None:
    now = hashes(compose(TRAINED, *overrides.split()))
    assert {task for task, value in now.items() if value != BASE[task]} == set(changed.split())


def test_settings_that_came_later_have_no_part_in_what_was_there_before() -> None:
    """So that a record made before a setting existed stays a replicate of the same cell."""
    config = compose("task=latency")
    for name, unused in identity.LATER.items():
        text = json.dumps(identity.identity(config))
        assert f'"{name}": {json.dumps(unused)}' not in text
    used = compose("experiment=bypass_latency", "latency.bypass_share=0.5")
    assert '"bypass_share": 0.5' in json.dumps(identity.identity(used))


def test_tables_1_and_6_share_one_record_per_replicate() -> None:
    paths = {identity.record_path(compose(f"experiment={name}")) for name in ("table1", "table6")}
    assert len(paths) == 1


def test_a_label_may_change_without_measuring_again() -> None:
    config = compose("task=latency", TRAINED)
    config.arms.table["base"].label = "another word"
    assert hashes(config)["latency"] == BASE["latency"]


def test_an_arm_that_does_not_run_has_no_part() -> None:
    config = compose("task=latency", TRAINED)
    config.methods["mixlora"].dropout = 0.3
    assert hashes(config)["latency"] == BASE["latency"]


def test_the_plain_backbone_is_the_same_whatever_adapters_learn() -> None:
    plain, other = (
        compose("method=base"),
        compose("method=base", "train.steps=3", "data.train_items=50", "experts.rank=2"),
    )
    assert identity.record_path(plain, Task.evaluate) == identity.record_path(other, Task.evaluate)
    fewer = compose("method=base", "data.test_items=3")
    assert identity.record_path(plain, Task.evaluate) != identity.record_path(fewer, Task.evaluate)


def test_untrained_arms_stand_on_no_training() -> None:
    one, two = (compose("latency.trained_adapters=false", f"train.steps={n}") for n in (3, 4))
    assert hashes(one)["latency"] == hashes(two)["latency"]
    other = compose("latency.trained_adapters=false", "experts.rank=2")
    assert hashes(one)["latency"] != hashes(other)["latency"]


def test_the_method_argument_stands_in_for_the_selected_one() -> None:
    config = compose("method=adafuse")
    mola = dataclasses.replace(config, method=config.methods["mola"])
    assert identity.identity(config, Task.train, config.methods["mola"]) == identity.identity(
        mola, Task.train
    )
    assert identity.adapter_dir(config, config.methods["mola"]) == identity.adapter_dir(mola, mola.method)
    assert identity.adapter_dir(config, config.method) != identity.adapter_dir(mola, mola.method)


def test_hash_is_canonical() -> None:
    assert identity.content_hash({"b": Task.layer, "a": (1, 2.0)}) == identity.content_hash(
        {"a": [1, 2.0], "b": "layer"}
    )
    assert identity.content_hash({"a": 1}) != identity.content_hash({"a": 2})
    assert len(identity.content_hash({})) == 12


@pytest.mark.parametrize("task", list(Task), ids=lambda task: task.name)
def test_names_are_short_and_safe(task: Task) -> None:
    config = compose()
    config.model.path = "/somewhere/a model with spaces & more " + "x" * 200
    name = cell_names.cell_id(config, task)
    assert len(name) <= 80
    assert not set(name) & set(" /&")
    path = identity.record_path(config, task)
    assert path.parent == Path("results/runs/records") / task.name
    assert path.name == f"{name}-{identity.content_hash(identity.identity(config, task))}.jsonl"


def test_folders() -> None:
    config = compose("runs_dir=R")
    assert identity.backbone_dir(config).parent == Path("R/backbones")
    assert identity.adapter_dir(config, config.method).parent == Path("R/adapters")
    assert identity.data_dir(config).parent == Path("R/data")
    assert identity.data_dir(config) != identity.data_dir(compose("runs_dir=R", "data.test_items=3"))
    assert identity.data_dir(config) != identity.data_dir(compose("runs_dir=R", "seed=1"))


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_changed_checkpoint_in_the_same_folder_is_another_backbone(tmp_path: Path) -> None:
    # 5 MiB is sampled, not read whole
    weights = bytearray(5 << 20)
    config = compose(f"model.path={checkpoint(tmp_path / 'm', bytes(weights))}")
    before = hashes(config)
    (tmp_path / "m" / "model.safetensors").touch()
    assert hashes(config) == before, "the time of a file is no part of its content"
    for start in range(0, len(weights), 4096):
        weights[start] = 1
    checkpoint(tmp_path / "m", bytes(weights))
    after = hashes(config)
    assert {task for task in after if after[task] != before[task]} == {
        "train",
        "evaluate",
        "latency",
        "memory",
        "trace",
        "drift",
    }
    (tmp_path / "m" / "tokenizer.json").write_text("{ }")
    assert hashes(config)["train"] != after["train"]


def test_a_small_checkpoint_is_read_to_its_last_byte(tmp_path: Path) -> None:
    config = compose(f"model.path={checkpoint(tmp_path / 'm', bytes(300_000))}")
    before = hashes(config)
    checkpoint(tmp_path / "m", bytes(299_999) + b"1")
    assert hashes(config)["train"] != before["train"]


def test_a_missing_checkpoint_has_a_name_all_the_same(tmp_path: Path) -> None:
    assert identity.record_path(compose(f"model.path={tmp_path / 'none'}")).name


def test_as_plain_is_json() -> None:
    plain = identity.as_plain(compose("model.path=/x"))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["task"] == "evaluate" and plain["method"]["routing"] == "token"


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        identity.file_hash(tmp_path / "f")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_identity_needs_no_torch() -> None:
    code = "import sys; from adafuse import identity; from adafuse.training import data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
