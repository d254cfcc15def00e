"""The commit that a record names is the commit that made it, also on a machine that holds a copy without history."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from adafuse import provenance


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A clean clone with one source, in the project's place; calls git in it."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("1")
    (tmp_path / ".gitignore").write_text(f"{provenance.STAMP}\n__pycache__\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    return git


def test_dirty_means_the_sources_not_the_results(clone, tmp_path: Path) -> None:
    commit, dirty = provenance.git_state()
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("new")
    assert provenance.git_state() == (commit, False)
    (tmp_path / "src" / "b.py").write_text("2")
    assert provenance.git_state() == (commit, True)


def test_a_copy_without_history_knows_its_commit_by_the_stamp(clone, tmp_path: Path) -> None:
    commit, _ = provenance.git_state()
    provenance.stamp()
    shutil.rmtree(tmp_path / ".git")
    assert provenance.git_state() == (commit, False)
    cache = tmp_path / "src" / "__pycache__"
    cache.mkdir()
    (cache / "a.pyc").write_text("compiled")
    assert provenance.git_state() == (commit, False), "what Python leaves is no source"
    (tmp_path / "src" / "a.py").write_text("2")
    assert provenance.git_state() == (commit, True)
    (tmp_path / provenance.STAMP).unlink()
    assert provenance.git_state() == (None, None)


def test_a_file_that_moved_is_a_change(clone, tmp_path: Path) -> None:
    provenance.stamp()
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / "src" / "a.py").rename(tmp_path / "src" / "c.py")
    assert provenance.git_state()[1] is True


def test_a_stamp_of_these_very_sources_wins_over_an_old_clone(clone, tmp_path: Path) -> None:
    old, _ = provenance.git_state()
    (tmp_path / "src" / "a.py").write_text("2")
    clone("commit", "-am", "two")
    new, _ = provenance.git_state()
    provenance.stamp()
    clone("reset", "--soft", old)
    assert provenance.git_state() == (new, False)
    (tmp_path / "src" / "a.py").write_text("3")
    assert provenance.git_state() == (old, True), "a stamp of other sources says nothing"


def test_only_a_clean_clone_is_stamped(clone, tmp_path: Path) -> None:
    (tmp_path / "src" / "a.py").write_text("2")
    with pytest.raises(ValueError, match="the sources differ from it: commit them first"):
        provenance.stamp()


def test_without_git_and_stamp_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_state() == (None, None)
