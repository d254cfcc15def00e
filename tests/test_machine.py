"""What the header says of code and machine: the commit that made a record, also on a machine that holds a copy without
history, and the libraries and processors, also without a GPU or its driver.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from adafuse import machine


def test_machine_without_a_gpu():
    found = machine.machine("cpu")
    assert found["name"] == "cpu" and found["gpu"] is None and "gpu_id" not in found
    assert found["cores"] >= 1 and found["memory_gib"] > 0 and found["cpu"]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "t4"), ("", "gpu")],
)
def test_folder_name(gpu, name):
    assert machine.folder_name(gpu) == name


def test_a_card_is_told_from_others_and_never_named() -> None:
    """The hash is `printf GPU-... | sha256sum | head -c 12`, so that whoever has the card can find its records."""
    uuid = "6a3d1c52-8c0f-4b1e-9d57-0f6f0a1b2c3d"
    properties = SimpleNamespace(name="NVIDIA H200", uuid=uuid)
    cuda = {"is_available": lambda: True, "current_device": lambda: 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, made_up in {**cuda, "get_device_properties": lambda _: properties}.items():
            patch.setattr(f"torch.cuda.{name}", made_up)
        found = machine.machine()
    assert found["gpu_id"] == "b6f6bc844e40" and uuid not in str(found)
    assert machine.gpu_id("NVIDIA H200 MIG 1g.18gb", uuid) is None, "a slice does not tell the card"


def test_versions_name_what_can_change_a_number():
    assert {"python", "torch", "transformers", "numpy"} <= set(machine.versions())


class Refused(Exception):
    pass


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """pynvml with one GPU."""
    made_up = SimpleNamespace(
        NVMLError=Refused,
        inits=[],
        nvmlInit=lambda: made_up.inits.append(1),
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlSystemGetDriverVersion=lambda: "575.1",
        nvmlDeviceGetPowerManagementLimit=lambda gpu: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", made_up)
    machine.nvml_handle.cache_clear()
    yield made_up
    machine.nvml_handle.cache_clear()


def test_the_driver_is_asked_by_uuid_and_initialised_once(driver: SimpleNamespace) -> None:
    assert machine.nvml_handle("u") == (driver, "handle of GPU-u")
    assert machine._driver("u") == ("575.1", 700.0) and len(driver.inits) == 1


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlSystemGetDriverVersion"])
def test_a_driver_that_refuses_says_nothing(driver: SimpleNamespace, call: str) -> None:
    def refuse(*_: object) -> None:
        raise Refused

    setattr(driver, call, refuse)
    assert machine._driver("u") == (None, None)


def test_without_the_drivers_library_nothing_is_said(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.nvml_handle("u") is None and machine._driver("u") == (None, None)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A clean clone with one source, in the project's place; calls git in it."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("1")
    (tmp_path / ".gitignore").write_text(f"{machine.STAMP}\n__pycache__\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    return git


def test_dirty_means_the_sources_not_the_results(clone, tmp_path: Path) -> None:
    commit, dirty = machine.git_state()
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("new")
    assert machine.git_state() == (commit, False)
    (tmp_path / "src" / "b.py").write_text("2")
    assert machine.git_state() == (commit, True)


def test_a_copy_without_history_knows_its_commit_by_the_stamp(clone, tmp_path: Path) -> None:
    commit, _ = machine.git_state()
    machine.stamp()
    shutil.rmtree(tmp_path / ".git")
    assert machine.git_state() == (commit, False)
    cache = tmp_path / "src" / "__pycache__"
    cache.mkdir()
    (cache / "a.pyc").write_text("compiled")
    assert machine.git_state() == (commit, False), "what Python leaves is no source"
    (tmp_path / "src" / "a.py").write_text("2")
    assert machine.git_state() == (commit, True)
    (tmp_path / machine.STAMP).unlink()
    assert machine.git_state() == (None, None)


def test_a_file_that_moved_is_a_change(clone, tmp_path: Path) -> None:
    machine.stamp()
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / "src" / "a.py").rename(tmp_path / "src" / "c.py")
    assert machine.git_state()[1] is True


def test_a_stamp_of_these_very_sources_wins_over_an_old_clone(clone, tmp_path: Path) -> None:
    old, _ = machine.git_state()
    (tmp_path / "src" / "a.py").write_text("2")
    clone("commit", "-am", "two")
    new, _ = machine.git_state()
    machine.stamp()
    clone("reset", "--soft", old)
    assert machine.git_state() == (new, False)
    (tmp_path / "src" / "a.py").write_text("3")
    assert machine.git_state() == (old, True), "a stamp of other sources says nothing"


def test_only_a_clean_clone_is_stamped(clone, tmp_path: Path) -> None:
    (tmp_path / "src" / "a.py").write_text("2")
    with pytest.raises(ValueError, match="the sources differ from it: commit them first"):
        machine.stamp()


def test_without_git_and_stamp_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.git_state() == (None, None)
