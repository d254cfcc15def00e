"""prepare.py makes profile paper's folders from repositories as published, and says in one line what is wrong."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from synthetic.configurations import ROOT
from synthetic.mirror import mirror

Row = dict[str, Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mirror(tmp_path_factory.mktemp("mirror"), ["anatomy"])


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("prepare")


@pytest.fixture
def made(prepare: ModuleType, published: Path, tmp_path: Path) -> Callable[..., Path]:
    """Prepares what is named, from the mirror."""

    def make(name: str, *more: str, source: Path = published) -> Path:
        out = tmp_path / "out" / name
        assert prepare.main([name, "--from", str(source), "--out", str(out), *more]) == 0
        return out

    return make


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_scienceqa_is_asked_in_molas_form_without_images(made: Callable[..., Path]) -> None:
    folder = made("scienceqa")
    test = rows(folder / "test.jsonl")
    assert len(test) == 11, "one of twelve has an image"
    assert test[1]["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nContext: Look.\nQuestion: Which is green? test 2\nOptions: (A) cloud (B) apple\n"
        "\n\n### Response:\n"
    )
    assert test[1]["choices"] == ["Answer: The answer is A.", "Answer: The answer is B."]
    assert test[1]["label"] == 0 and "Context: N/A\n" in test[0]["prompt"]


def test_questionnaires_without_a_hint_have_no_context_and_commonsense_qa_is_tested_on_validation(
    made: Callable[..., Path],
) -> None:
    common, book = made("commonsense_qa"), made("openbookqa")
    test = rows(common / "test.jsonl")
    assert len(test) == 12 and all("validation" in row["prompt"] for row in test)
    assert [len(rows(common / f"{split}.jsonl")) for split in ("train", "validation")] == [11, 1]
    (row,) = (row for row in rows(book / "test.jsonl") if "test 5" in row["prompt"])
    assert "### Instruction:\nQuestion: A candle is test 5\nOptions: (A) red (B) blue" in row["prompt"]
    assert row["label"] == 1 and len(row["choices"]) == 4


def test_the_mixture_has_its_shares_and_pescs_template_and_one_question_stands_in_one_split(
    made: Callable[..., Path],
) -> None:
    folder = made("pesc", "--rows", "15")
    split = {name: rows(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    asked = [row["prompt"] for part in split.values() for row in part]
    assert len(set(asked)) == len(asked)
    sources = {"Name thing": 9, "Print": 0, "Return": 0, "+1?": 3}
    found = {mark: sum(mark in row["prompt"] for row in split["train"]) for mark in sources}
    assert found["Name thing"] == 9 and found["+1?"] == 3 and found["Print"] + found["Return"] == 3
    assert all("\n" not in row["answer"] for row in split["test"])
    prompts = {row["prompt"] for row in split["train"]}
    assert "### System:\nYou are short.\n### Human:\nName thing 8\n### Assistant:\n" in prompts
    assert not [prompt for prompt in prompts if "Hello" in prompt], "one question and its answer, no more"


def test_rows_of_train_that_stand_in_test_are_left_out_and_counted(
    made: Callable[..., Path], published: Path, tmp_path: Path
) -> None:
    other = tmp_path / "mirror"
    shutil.copytree(published / "allenai/openbookqa", other / "allenai/openbookqa")
    main = other / "allenai/openbookqa/main"
    shutil.copy(main / "test-00000-of-00001.parquet", main / "train-00001-of-00002.parquet")
    folder = made("openbookqa", source=other)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 12, "validation": 12, "test": 12}
    assert manifest["left_out_as_in_another_split"] == {"train": 12, "validation": 0, "test": 0}


def test_prompts_are_the_same_fifty_whatever_their_order(
    made: Callable[..., Path], published: Path, tmp_path: Path
) -> None:
    prompts = rows(made("sharegpt") / "prompts.jsonl")
    assert len(prompts) == 50 and all(row["prompt"].startswith("Tell me of a ") for row in prompts)
    (file,) = (published / "anon8231489123").rglob("*.json")
    other = tmp_path / "mirror" / file.relative_to(published)
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    shutil.rmtree(tmp_path / "out")
    assert rows(made("sharegpt", source=tmp_path / "mirror") / "prompts.jsonl") == prompts


def test_everything_is_made_once_with_its_sources_hashes_and_licences(
    prepare: ModuleType, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["paper", "--from", str(published), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    # what there is to fetch comes first
    assert said.startswith("llama2_7b: 13,480 MB to fetch") and "CC-BY-NC-SA-4.0" in said.split("revision")[0]
    assert "revision not known, taken as it is (fixed: 01c7f73d771dfac7d292323805ebc428287df4f9)" in said
    folders = [tmp_path / "models/llama2_7b", tmp_path / "models/mistral_7b"]
    folders += [tmp_path / "data" / name for name in (*prepare.DATA, "sharegpt", "evaluation")]
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        for source in manifest["sources"]:
            assert len(source["fixed_revision"]) == 40 and source["licence"] and source["sha256"]
        for name, known in manifest.get("files", {}).items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == known
    assert len(list((tmp_path / "models/llama2_7b").glob("*.safetensors"))) == 2
    assert prepare.main(["paper", "--from", "/nowhere", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("is there already") == len(folders)


def test_what_hf_download_noted_is_held_against_the_files(
    prepare: ModuleType, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = tmp_path / "mirror/meta-math/MetaMathQA"
    shutil.copytree(published / "meta-math/MetaMathQA", origin)
    file, source = origin / "MetaMathQA-395K.json", prepare.published.METAMATHQA
    note = origin / ".cache/huggingface/download/MetaMathQA-395K.json.metadata"
    note.parent.mkdir(parents=True)
    known = hashlib.sha256(file.read_bytes()).hexdigest()
    note.write_text(f"{source.revision}\n{known}\n1700000000.0\n")
    about = prepare.fetched(source, tmp_path / "a", tmp_path / "mirror")
    assert about["revision"] == source.revision and capsys.readouterr().out == ""
    assert about["sha256"] == {file.name: known}
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match="is not meta-math/MetaMathQA's as published"):
        prepare.fetched(source, tmp_path / "b", tmp_path / "mirror")


def without(repository: str, name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / repository / name).unlink()


def spoilt(folder: Path) -> None:
    (file,) = (folder / "meta-math").rglob("*.json")
    file.write_text(json.dumps([{"question": "x"}]))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "openbookqa",
            lambda folder: shutil.rmtree(folder / "allenai"),
            "holds none of allenai/openbookqa's",
        ),
        ("pesc", spoilt, "do not hold what was published (KeyError: 'query')"),
        (
            "llama2_7b",
            without("meta-llama/Llama-2-7b-hf", "model-00002-of-00002.safetensors"),
            "lacks model-00002-of-00002.safetensors",
        ),
        (
            "openbookqa",
            without("allenai/openbookqa", "main/test-00000-of-00001.parquet"),
            "has no test file",
        ),
    ],
    ids=["no repository", "no column", "no shard", "no split"],
)
def test_what_is_missing_is_one_line_and_leaves_no_folder(
    prepare: ModuleType,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    other = tmp_path / "mirror"
    shutil.copytree(published, other)
    spoil(other)
    assert prepare.main([name, "--from", str(other), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_one_line(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["mistral_7b", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: cannot fetch mistralai/Mistral-7B-v0.1 (")
    assert "--from FOLDER" in said
