"""cell.py: a setting that changes a result changes the hash, and one that does not leaves the record shared."""

import csv
import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse import cell, stages
from adafuse.config import Arm, Config, Runtime, StrategyName, Task, arm_version
from adafuse.data import items
from synthetic.configurations import ROOT, compose


def of(config: Config, task: Task) -> Config:
    return dataclasses.replace(config, task=task)


def hashes(config: Config) -> dict[str, str]:
    return {task.name: cell.cell_hash(of(config, task)) for task in Task}


BASE: dict[str, str] = {}
# arms that stand on trained adapters stand on more settings than those on random factors
TRAINED = "latency.trained_adapters=true"


@pytest.fixture(scope="module", autouse=True)
def _base() -> None:
    BASE.update(hashes(compose(TRAINED)))


# what must be made again after a change, and nothing else
CHANGES = [
    ("seed=1", "train evaluate latency memory trace layer kernel drift fit_speed"),
    ("model.seed=1", "pretrain train evaluate latency memory trace drift fit_speed"),
    (
        "model.shape.hidden_size=64",
        "pretrain train evaluate latency memory trace layer kernel drift fit_speed",
    ),
    ("model.dtype=bfloat16", "pretrain train evaluate latency memory trace layer kernel drift fit_speed"),
    ("model.weights=random", "train evaluate latency memory trace drift fit_speed"),
    ("pretrain.steps=3", "pretrain train evaluate latency memory trace drift fit_speed"),
    ("pretrain.save_every_steps=3", ""),
    ("train.steps=3", "train evaluate latency memory trace drift fit_speed"),
    ("train.save_every_steps=3", ""),
    ("experts.rank=2", "train evaluate latency memory trace drift fit_speed"),
    ("experts.count=4", "train evaluate latency memory trace layer kernel drift fit_speed"),
    ("method=mola", "train evaluate drift fit_speed"),
    ("method.dropout=0.2", "train evaluate latency memory trace drift fit_speed"),
    ("data=domain", "train evaluate latency memory trace drift"),
    ("data.train_items=50", "train evaluate latency memory trace drift"),
    ("data.level=2", "train evaluate latency memory trace drift"),
    ("suite.limit=3", "evaluate"),
    ("+suite.shots_by_task={sort:2}", "evaluate"),
    ("evaluate_dtype=bfloat16", "evaluate"),
    ("evaluate_strategy=switch evaluate_restore=false", "evaluate"),
    ("method.null_expert=true", "train evaluate latency memory trace drift fit_speed"),
    ("method.router_norm=true", "train evaluate latency memory trace drift fit_speed"),
    ("method.learning_rate_factor=0.1", "train evaluate latency memory trace drift"),
    ("budget=equal", "latency memory trace"),
    ("evaluate_strategy=gather", "evaluate"),
    ("arms=smoke", "latency memory trace"),
    ("latency.rounds=3", "latency fit_speed"),
    ("latency.block_tokens=128", "latency memory"),
    ("latency.settle_tokens=5", "latency trace"),
    ("batch=2", "latency memory trace"),
    ("context=32", "latency memory trace drift"),
    ("replicate=1", "latency memory trace layer kernel drift fit_speed"),
    ("device=cuda", "latency memory trace layer kernel drift fit_speed"),
    ("layer.runs=10", "layer"),
    ("kernel.replays=3", "kernel"),
    ("kernel.tokens=[1]", "kernel"),
    ("drift.dtype=float16", "drift"),
    ("drift.refresh_every=3", "drift"),
    ("tracker=wandb", ""),
    ("runs_dir=elsewhere", ""),
    (
        "profile=gpu model=tiny experts=all_r4",
        "pretrain train evaluate latency memory trace layer kernel drift fit_speed",
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
    for name, unused in cell.LATER.items():
        text = json.dumps(cell.identity(config))
        assert f'"{name}": {json.dumps(unused)}' not in text
    used = compose("experiment=bypass_latency", "latency.bypass_share=0.5")
    assert '"bypass_share": 0.5' in json.dumps(cell.identity(used))


def test_where_prepared_data_sets_lie_has_no_part_in_a_cell_and_what_they_hold_has(tmp_path: Path) -> None:
    hashes = {}
    for place, known in (("here", "0a"), ("there", "0a"), ("other", "0b")):
        (tmp_path / place).mkdir()
        sources = [{"repo": "OWNER/NAME", "sha256": {"train.parquet": known}}]
        (tmp_path / place / "manifest.json").write_text(json.dumps({"sources": sources}))
        hashes[place] = cell.cell_hash(compose("task=evaluate", f"suite.path={tmp_path / place}"))
    assert hashes["here"] == hashes["there"] != hashes["other"]
    assert hashes["here"] != cell.cell_hash(compose("task=evaluate"))


def test_tables_1_and_6_share_one_record_per_replicate() -> None:
    paths = {cell.record_path(compose(f"experiment={name}")) for name in ("table1", "table6")}
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
    assert cell.record_path(of(plain, Task.evaluate)) == cell.record_path(of(other, Task.evaluate))
    fewer = compose("method=base", "data.test_items=3")
    assert cell.record_path(of(plain, Task.evaluate)) != cell.record_path(of(fewer, Task.evaluate))


def test_untrained_arms_stand_on_no_training() -> None:
    one, two = (compose("latency.trained_adapters=false", f"train.steps={n}") for n in (3, 4))
    assert hashes(one)["latency"] == hashes(two)["latency"]
    other = compose("latency.trained_adapters=false", "experts.rank=2")
    assert hashes(one)["latency"] != hashes(other)["latency"]


def test_the_method_of_an_adapter_stands_in_for_the_selected_one() -> None:
    config = compose("method=adafuse")
    mola = dataclasses.replace(config, method=config.methods["mola"])
    assert cell.adapter_dir(config, config.methods["mola"]) == cell.adapter_dir(mola, mola.method)
    assert cell.adapter_dir(config, config.method) != cell.adapter_dir(mola, mola.method)


def test_hash_is_canonical() -> None:
    assert cell.content_hash({"b": Task.layer, "a": (1, 2.0)}) == cell.content_hash(
        {"a": [1, 2.0], "b": "layer"}
    )
    assert cell.content_hash({"a": 1}) != cell.content_hash({"a": 2})
    assert len(cell.content_hash({})) == 12


@pytest.mark.parametrize("task", list(Task), ids=lambda task: task.name)
def test_names_are_short_and_safe(task: Task) -> None:
    config = compose()
    config.model.path = "/somewhere/a model with spaces & more " + "x" * 200
    name = cell.cell_id(of(config, task))
    assert len(name) <= 80
    assert not set(name) & set(" /&")
    path = cell.record_path(of(config, task))
    assert path.parent == Path("results/runs/records") / task.name
    assert path.name == f"{name}-{cell.cell_hash(of(config, task))}.jsonl"


def test_folders() -> None:
    config = compose("runs_dir=R")
    assert cell.backbone_dir(config).parent == Path("R/backbones")
    assert cell.adapter_dir(config, config.method).parent == Path("R/adapters")
    assert cell.data_dir(config).parent == Path("R/data")
    assert cell.data_dir(config) != cell.data_dir(compose("runs_dir=R", "data.test_items=3"))
    assert cell.data_dir(config) != cell.data_dir(compose("runs_dir=R", "seed=1"))


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
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
        "fit_speed",
    }
    (tmp_path / "m" / "tokenizer.json").write_text("{ }")
    assert hashes(config)["train"] != after["train"]


def test_a_small_checkpoint_is_read_to_its_last_byte(tmp_path: Path) -> None:
    config = compose(f"model.path={checkpoint(tmp_path / 'm', bytes(300_000))}")
    before = hashes(config)
    checkpoint(tmp_path / "m", bytes(299_999) + b"1")
    assert hashes(config)["train"] != before["train"]


def test_a_missing_checkpoint_has_a_name_all_the_same(tmp_path: Path) -> None:
    assert cell.record_path(compose(f"model.path={tmp_path / 'none'}")).name


def test_as_plain_is_json() -> None:
    plain = cell.as_plain(compose("model.path=/x"))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["task"] == "evaluate" and plain["method"]["routing"] == "token"


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        cell.file_hash(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_identity_needs_no_torch() -> None:
    code = "import sys; from adafuse import cell, membership; print({'torch', 'numpy', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_needed_cells_are_the_ones_a_cell_stands_on() -> None:
    config = compose("task=evaluate", "method=adafuse")
    assert [c.task.name for c in cell.needs(config)] == ["pretrain", "train"]
    assert [c.task.name for c in cell.with_needs(config)] == ["evaluate", "pretrain", "train", "pretrain"]
    config = compose("task=latency", "arms=smoke", "latency.trained_adapters=true")
    assert [(c.task.name, c.method.name) for c in cell.needs(config)][1:] == [("train", "adafuse")]
    assert not list(cell.needs(compose("task=layer")))


# arms whose code takes another time than when the first records were published
MENDED = {
    *(
        "mola_gather",
        "moral_gather",
        "pesc_gather",
        "mixlora_gather",
        "adafuse_gather",
        "adafuse_layerwise_gather",
    ),
    *("mola_dense", "adafuse_layerwise_dense", "moral_simple_merge", "adafuse_layerwise_simple_merge"),
    "adafuse_simple_merge",
    *("base_lean", "base_lean_again", "adafuse_switch_lean", "adafuse_rebase_lean"),
}
# and those of which a second version was never published
TWICE = {
    f"{method}_gather_lean"
    for method in ("lora", "mola", "moral", "pesc", "mixlora", "adafuse", "adafuse_layerwise")
}


def test_an_arm_whose_code_was_mended_is_another_cell_and_no_other_arm() -> None:
    config = compose("model.weights=random", "latency.trained_adapters=false")
    every = dataclasses.replace(config, arms=dataclasses.replace(config.arms, run=list(config.arms.table)))
    for task in (Task.latency, Task.trace, Task.memory):
        now, older = cell.identity(of(every, task)), cell.outdated_hashes(of(every, task))
        assert {name for name, own in now["arms"].items() if own[3:] == [2]} == MENDED
        assert {name for name, own in now["arms"].items() if own[3:] == [3]} == TWICE
        # what is published keeps its name: a first version is not written down
        before = now | {"arms": {name: own[:3] for name, own in now["arms"].items()}}
        assert older == [cell.content_hash(before)] and len(now["arms"]["adafuse_switch"]) == 3
        assert not set(older) & set(cell.known_records(of(every, task)).values())
        assert cell.outdated_hashes(of(compose("arms=graph"), task)) == []
    said = stages.run_fields(of(every, Task.latency), "")["arm_versions"]
    assert said == {name: 1 + (name in MENDED) + 2 * (name in TWICE) for name in every.arms.run}
    # a captured merge shifts its shared gates as rarely; captured gathering never went through torch's dispatcher
    for strategy, runtime, version in (
        ("simple_merge", "graph", 2),
        ("gather", "graph", 1),
        ("gather", "lean", 3),
    ):
        arm = Arm("adafuse", StrategyName[strategy], Runtime[runtime], "")
        assert arm_version(arm, config.methods["adafuse"]) == version
    # what is right or wrong does not hang on how fast it is
    assert cell.outdated_hashes(compose("task=evaluate", "method=adafuse", "evaluate_strategy=gather")) == []
    assert stages.run_fields(compose("task=evaluate"), "")["arm_versions"] == {}


def test_the_python_that_runs_has_no_part_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(TRAINED)
    before = hashes(config)
    former = {task.name: cell.former_hashes(of(config, task), other_pythons=False) for task in Task}
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    assert hashes(config) == before
    for task in Task:
        (now,), (old,) = (
            cell.former_hashes(of(config, task), other_pythons=False) or [""],
            former[task.name] or [""],
        )
        # what stands on text was named by the Python before; what does not never changed its name
        assert (now != old) == (task not in (Task.layer, Task.kernel)) and before[task.name] not in (now, old)
    random = compose("model.weights=random", "latency.trained_adapters=false")
    assert cell.former_hashes(of(random, Task.latency)) == []


def test_another_library_is_another_text_where_text_is_cut_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cloze, without = compose("data.families=[copy,cloze]"), compose("data.families=[copy]")
    before = [cell.data_dir(with_cloze), cell.data_dir(without), cell.backbone_dir(without)]
    items.items_version.cache_clear()
    items.pretraining_version.cache_clear()
    monkeypatch.setattr(items.standard_library, "fingerprint", lambda: "another")
    after = [cell.data_dir(with_cloze), cell.data_dir(without), cell.backbone_dir(without)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]
    items.items_version.cache_clear()
    items.pretraining_version.cache_clear()


def test_where_a_checkpoint_lies_has_no_part_and_its_former_name_is_known(tmp_path: Path) -> None:
    here, there = (checkpoint(tmp_path / place / "m", bytes(1000)) for place in "ab")
    one, other = (compose(f"model.path={folder}") for folder in (here, there))
    assert hashes(one) == hashes(other)
    assert cell.former_hashes(of(one, Task.train)) != cell.former_hashes(of(other, Task.train))
    files = cell.identity(of(one, Task.train))["backbone"]["files"]
    files |= {"config.json": cell._fingerprint(here / "config.json")}
    before = {"path": str(here), "dtype": "float32", "files": files}
    wanted = cell.identity(of(one, Task.train)) | {"backbone": before}
    wanted["data"] |= {"text": f"2 of Python {platform.python_version()}"}
    assert cell.content_hash(wanted) in cell.former_hashes(of(one, Task.train))
    assert hashes(compose(f"model.path={here.rename(here.with_name('n'))}")) != hashes(other)


@pytest.mark.parametrize("task", ["layer", "kernel"])
def test_of_a_checkpoints_sizes_what_saved_them_has_no_part(task: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", bytes(10))
    config = compose(f"model.path={folder}", f"task={task}")
    sizes = {"model_type": "llama", "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(sizes))
    before = hashes(config)[task]
    more = sizes | {"_name_or_path": "/home/somebody", "transformers_version": "5.0"}
    (folder / "config.json").write_text(json.dumps(more))
    assert hashes(config)[task] == before
    assert cell.former_hashes(config) == [cell.content_hash(cell.identity(config) | {"shape": more})]
    (folder / "config.json").write_text(json.dumps(sizes | {"hidden_size": 65}))
    assert hashes(config)[task] != before


def test_which_version_saved_a_checkpoint_has_no_part_and_its_former_name_is_known(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", bytes(10))
    config = of(compose(f"model.path={folder}"), Task.train)
    before = cell.cell_hash(config)
    declared = {"model_type": "llama", "transformers_version": "5.0"}
    (folder / "config.json").write_text(json.dumps(declared))
    assert cell.cell_hash(config) == before
    wanted = cell.identity(config)
    wanted["backbone"]["files"] |= {"config.json": cell._fingerprint(folder / "config.json")}
    assert cell.content_hash(wanted) in cell.former_hashes(config)
    (folder / "config.json").write_text(json.dumps(declared | {"hidden_size": 65}))
    assert cell.cell_hash(config) != before


def test_files_of_a_former_name_are_found_until_there_are_others(tmp_path: Path) -> None:
    config = compose(f"runs_dir={tmp_path}", "task=train", "method=lora")
    for kind, task, find in (
        ("backbones", Task.pretrain, lambda: cell.backbone_dir(config)),
        ("adapters", Task.train, lambda: cell.adapter_dir(config, config.method)),
    ):
        now, name = find(), cell.cell_id(of(config, task))
        own, published = cell.former_hashes(of(config, task)), set(cell.PUBLISHED_PYTHONS)
        assert len(own) == len(published | {platform.python_version()})
        for known in own[1:]:
            (tmp_path / kind / f"{name}-{known}").mkdir(parents=True)
        assert find() == now, "of another Python's text"
        (tmp_path / kind / f"{name}-{own[0]}").mkdir()
        assert find() == tmp_path / kind / f"{name}-{own[0]}"
        now.mkdir()
        assert find() == now
    folder = items.write(config.data, cell.data_dir(config), config.seed)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"]["text"] = f"2 of Python {platform.python_version()}"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    former = folder.rename(folder.with_name(folder.name[:-12] + cell.content_hash(manifest["recipe"])))
    assert items.write(config.data, cell.data_dir(config), config.seed) == former
    manifest["recipe"]["text"] = "2 of Python 2.7.18"
    (former / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds data of other settings"):
        items.write(config.data, former, config.seed)


def test_a_mended_family_makes_the_cells_anew_that_stand_on_it_and_no_others() -> None:
    """Records of wrong text are not found as done, but as withdrawn; a backbone has no part in it."""
    for level, families, task, withdrawn in (
        (3, "copy,comparison", "evaluate", 3),
        (3, "copy,comparison", "train", 3),
        (2, "comparison", "drift", 3),
        (3, "copy,comparison", "pretrain", 0),
        (3, "copy,sort", "evaluate", 0),
        (1, "copy,comparison", "evaluate", 0),
    ):
        config = compose(f"task={task}", TRAINED, f"data.level={level}", f"data.families=[{families}]")
        now, former, wrong = cell.identity(config), cell.former_hashes(config), cell.withdrawn_hashes(config)
        assert len(wrong) == withdrawn and not {cell.content_hash(now), *former} & set(wrong)
        data = now.get("data") or now.get("train", now.get("adapter", {})).get("data")
        # a header that names its text is of a record since then
        assert stages.run_fields(config, "")["text"] == cell.text(config) == (data and data["text"])
        if task == "evaluate":
            text = items.items_version(tuple(sorted(families.split(","))))
            before = now | {"train": now["train"] | {"data": now["train"]["data"] | {"text": text}}}
            assert [cell.content_hash(before)] == (wrong[:1] or [cell.content_hash(now)])
            assert (cell.data_dir(config).name[-12:] == cell.content_hash(before["train"]["data"])) == (
                not wrong
            )


def published() -> list[dict[str, str]]:
    """A quarter of the published membership: of each experiment, profile and task the first row."""
    with (ROOT / "results" / "membership.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"]]
    first: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        first.setdefault((row["experiment"], row["profile"], row["task"]), row)
    # drift was measured with other settings than its file now has; two of the pilot's tasks had other items each time
    rows = [row for row in first.values() if row["task"] != "drift" and row["experiment"] != "real_pilot"]
    real = [row for row in rows if row["profile"] == "real"]
    return [row for row in rows if row not in real][::4] + real


# by their fingerprints, what published records of profile real stand on: one file of weights, and two tokenizers that
# write the same tokens, the former as transformers 5.17 saved it
WEIGHTS = {"model.safetensors": "c52e066e6eff"}
TOKENIZERS = (
    {"tokenizer.json": "14531ed8ea2b", "tokenizer_config.json": "50f42bf01995"},
    {"tokenizer.json": "d62479f1ad50", "tokenizer_config.json": "90d3f2f66d9b"},
)


@pytest.mark.parametrize(
    "row", published(), ids=lambda row: f"{row['experiment']}-{row['profile']}-{row['task']}"
)
def test_published_records_are_found_by_what_their_experiment_composes(
    row: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2 = Path(__file__).parent / "synthetic" / "smollm2"
    chosen = [f"experiment={row['experiment']}", f"profile={row['profile']}", *shlex.split(row["overrides"])]
    chosen += [f"model.path={smollm2}"] if row["profile"] == "real" else []
    # as a GPU settles it for weights that are stored so
    chosen += ["model.dtype=bfloat16"] if row["experiment"] == "own_model" else []
    known, replaced = set(), set()
    files = cell._files
    for tokenizer in TOKENIZERS if row["profile"] == "real" else TOKENIZERS[:1]:
        there = {smollm2: WEIGHTS | tokenizer}
        monkeypatch.setattr(cell, "_files", lambda path, there=there: files(path) | there.get(path, {}))
        for one in cell.with_needs(compose(*chosen)):
            known |= {(one.task.name, key) for key in (cell.cell_hash(one), *cell.former_hashes(one))}
            older = [*cell.withdrawn_hashes(one), *cell.outdated_hashes(one)]
            replaced |= {(one.task.name, key) for key in older}
    assert not known & replaced
    assert (row["task"], row["record"]) in known | replaced


def test_a_checkpoint_without_a_readable_config_is_named(tmp_path: Path) -> None:
    """A cell's name is asked for before anybody looks at the folder."""
    (tmp_path / "config.json").write_text("// mine\n{}")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is not valid JSON"):
        cell.record_path(compose("task=evaluate", f"model.path={tmp_path}", "method=base"))
