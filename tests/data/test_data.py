"""The data folder: written once, the same each time, checked whenever it is read; and what becomes of it as tokens."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse.config import Data
from adafuse.data import items as training_data
from adafuse.data import standard_library
from adafuse.data.families import FAMILIES, LEVELS, NAMES, Item, generate
from adafuse.data.tokens import training_rows
from adafuse.model.backbone import byte_tokenizer
from synthetic.configurations import compose

SMALL = Data(name="small", families=["copy", "cloze"], train_items=12, validation_items=4, test_items=5)


def own_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        row = {"prompt": f"sky of {split}?", "choices": ["red", "blue"], "label": 1}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def own(folder: Path) -> Data:
    return dataclasses.replace(SMALL, families=[], path=str(folder))


def test_what_is_written_is_what_was_generated(tmp_path: Path) -> None:
    folder = training_data.write(SMALL, tmp_path / "data", seed=0)
    for family in SMALL.families:
        assert training_data.load_items(folder, family, "test") == generate(family, "test", 5, seed=0)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["rows"] for name, entry in manifest["files"].items()} == {
        f"{family}.{split}.jsonl": n
        for family in SMALL.families
        for split, n in zip(("train", "validation", "test"), (12, 4, 5), strict=True)
    }
    assert manifest["recipe"]["text"] == training_data.items_version(("cloze", "copy"))
    assert not list(folder.glob("*.partial"))


def test_two_folders_are_identical_and_a_second_call_writes_nothing(tmp_path: Path) -> None:
    first, second = (training_data.write(SMALL, tmp_path / name, seed=0) for name in "ab")
    contents = {path.name: path.read_bytes() for path in first.iterdir()}
    assert contents == {path.name: path.read_bytes() for path in second.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    training_data.write(SMALL, first, seed=0)
    assert before == {path: path.stat().st_mtime_ns for path in first.iterdir()}


def test_the_version_of_generated_items_is_the_same_on_every_python() -> None:
    """What the published studies were trained on: if this fails, items have changed, and DATA_VERSION must."""
    drawn = ("addition", "comparison", "copy", "majority", "recital", "reverse", "sort")
    assert training_data.items_version(drawn) == "af5f88c6c823"


def test_a_mended_family_has_another_version_on_the_levels_that_were_wrong_alone() -> None:
    right = {name: [training_data.items_version((name,), level) for level in LEVELS] for name in FAMILIES}
    assert {name: len(set(versions)) for name, versions in right.items()} == {
        name: 2 if name == "comparison" else 1 for name in FAMILIES
    }
    assert right["comparison"][1] == right["comparison"][2]


def test_a_folder_of_items_before_they_were_mended_is_refused(tmp_path: Path) -> None:
    data = dataclasses.replace(SMALL, families=["comparison"], level=2)
    folder = training_data.write(data, tmp_path, seed=0)
    manifest = json.loads((folder / "manifest.json").read_text())
    for wrong in (
        training_data.former_text(manifest["recipe"], wrong=True),
        training_data.wrong_text(manifest["recipe"]),
    ):
        manifest["recipe"]["text"] = wrong
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="holds data of other settings"):
            training_data.write(data, folder, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_a_family_changes_its_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = training_data.items_version.__wrapped__((name,)), training_data.pretraining_version.__wrapped__()
    if name == "cloze":
        standard_library.fingerprint.cache_clear()
        monkeypatch.setattr(standard_library, "BEFORE_BYTES", 27)
    else:
        family = FAMILIES[name]
        told = {
            "item": lambda *of: dataclasses.replace(family.item(*of), answer="another"),
            "lesson": lambda *of: family.lesson(*of) + "!",
        }
        monkeypatch.setitem(FAMILIES, name, dataclasses.replace(family, **told))
    after = training_data.items_version.__wrapped__((name,)), training_data.pretraining_version.__wrapped__()
    standard_library.fingerprint.cache_clear()
    assert before[0] != after[0] and before[1] != after[1]


def test_an_interrupted_write_starts_again(tmp_path: Path) -> None:
    folder = training_data.write(SMALL, tmp_path, seed=0)
    expected = (folder / "copy.train.jsonl").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "copy.train.jsonl").write_text("half a li")
    assert (training_data.write(SMALL, folder, seed=0) / "copy.train.jsonl").read_bytes() == expected


@pytest.mark.parametrize("again", [True, False], ids=["write", "load_items"])
def test_a_hand_edited_file_is_refused(again: bool, tmp_path: Path) -> None:
    folder = training_data.write(SMALL, tmp_path, seed=0)
    with (folder / "copy.test.jsonl").open("a") as file:
        file.write('{"prompt": "<|> ab=", "answer": "ab"}\n')
    with pytest.raises(ValueError, match="copy.test.jsonl is not what was written: delete .* and run again"):
        training_data.write(SMALL, folder, seed=0) if again else training_data.load_items(
            folder, "copy", "test"
        )


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    training_data.write(SMALL, tmp_path, seed=0)
    with pytest.raises(ValueError, match="holds data of other settings"):
        training_data.write(SMALL, tmp_path, seed=1)


def test_missing_data_and_damaged_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data in"):
        training_data.load_items(tmp_path, "copy", "test")
    training_data.write(SMALL, tmp_path, seed=0)
    with pytest.raises(ValueError, match="no sort.test.jsonl in .*data.families"):
        training_data.load_items(tmp_path, "sort", "test")
    (tmp_path / "manifest.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match="manifest.json is damaged: delete"):
        training_data.load_items(tmp_path, "copy", "test")


def test_labels_cover_the_answer_and_its_end_alone(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    folder = training_data.write(SMALL, tmp_path, seed=0)
    for family in SMALL.families:
        items = training_data.load_items(folder, family, "train")
        encoded = training_data.dataset_of(SMALL, family, folder, tokenizer, 128, "train")
        assert len(encoded.rows) == encoded.said.rows == 12
        for row, item in zip(encoded.rows, items, strict=True):
            taught = tokenizer.decode([token for token in row["labels"] if token != -100])
            assert taught == (item.answer if item.choices else item.answer + "\n")
            assert len(row["labels"]) == len(row["input_ids"])
            assert tokenizer.decode(row["input_ids"]) == item.prompt + taught


def test_the_rows_of_the_published_studies_are_cut_as_they_were() -> None:
    """Bytes merge nothing, so the answer's tokens are those that follow the prompt's own length."""
    tokenizer = byte_tokenizer()
    for name, level in ((name, level) for name in NAMES for level in (1, 2, 3)):
        items = generate(name, "train", 40, 0, level)
        for item, row in zip(items, training_rows(items, tokenizer, 256).rows, strict=True):
            whole = item.prompt + item.answer + ("" if item.choices else "\n")
            ids, prompt = tokenizer(whole)["input_ids"], tokenizer(item.prompt)["input_ids"]
            assert row == {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def test_own_items_replace_the_families_in_training(tmp_path: Path) -> None:
    data = own(own_folder(tmp_path / "own"))
    folder = training_data.write(data, tmp_path / "data", seed=0)
    assert training_data.families_of(data) == ["local"]
    assert training_data.load_items(folder, "local", "test") == [
        Item("sky of test?", "blue", ["red", "blue"], 1)
    ]
    rows = training_data.dataset_of(data, "local", folder, byte_tokenizer(), 64, "train").rows
    assert byte_tokenizer().decode(rows[0]["input_ids"]) == "sky of train?blue"
    with pytest.raises(
        ValueError, match=re.escape(f"{tmp_path / 'own' / 'train.jsonl'}: train.max_length=1")
    ):
        training_data.dataset_of(data, "local", folder, byte_tokenizer(), 1, "train")


def test_own_items_that_have_changed_are_noticed(tmp_path: Path) -> None:
    data = own(own_folder(tmp_path / "own"))
    training_data.write(data, tmp_path / "data", seed=0)
    (tmp_path / "own" / "test.jsonl").write_text('{"prompt": "2+3=", "answer": "5"}')
    with pytest.raises(ValueError, match="other settings"):
        training_data.write(data, tmp_path / "data", seed=0)


def test_an_item_without_a_place_for_its_answer_names_its_family(tmp_path: Path) -> None:
    folder = training_data.write(SMALL, tmp_path, seed=0)
    with pytest.raises(ValueError, match="copy, train items: train.max_length=1 leaves no room"):
        training_data.dataset_of(SMALL, "copy", folder, byte_tokenizer(), 1, "train")


def test_own_rows_are_looked_at_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """The hash of a cell covers them, and it is the first thing that a run asks for."""
    folder = own_folder(tmp_path / "own")
    (folder / "test.jsonl").write_text('{"prompt": "p", "answer": null}')
    code = f"""
import sys
from adafuse.config import Data
from adafuse.data.items import recipe
data = Data("own", [], 1, {str(folder)!r}, 1, 1, 1)
try:
    recipe(data, 0)
except ValueError as error:
    print(error)
print([name for name in ("torch", "transformers", "datasets", "lm_eval") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        f"{folder}/test.jsonl, line 1, answer: is missing, and so are choices",
        "[]",
    ]


def test_own_items_are_all_that_is_learnt_and_asked(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "own")
    config = compose(f"data.path={folder}")
    assert (config.data.families, config.suite.tasks) == ([], ["local_choices"])
    both = compose(f"data.path={folder}", "data.families=[copy]")
    assert (both.data.families, both.suite.tasks) == (["copy"], ["copy", "local_choices"])
    named = compose(f"data.path={folder}", "suite.tasks=[local_answers]")
    assert (named.data.families, named.suite.tasks) == ([], ["local_answers"])
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(f'{{"prompt": "2+3 of {split}=", "answer": "5"}}\n')
    assert compose(f"data.path={folder}").suite.tasks == ["local_answers"]
