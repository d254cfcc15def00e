"""What is written is there whole or not at all; what would be waited for without end is found before it is opened."""

import errno
import os
import sys
from pathlib import Path

import pytest

from adafuse import compose as composing
from adafuse import files, stages
from adafuse.config import Experts
from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import compose
from synthetic.scripts import LAYER, call, script


@pytest.mark.parametrize("there", ["nothing", "file", "FIFO", "link", "dead link"])
def test_a_file_is_put_in_place_of_whatever_is_there(there: str, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "new/page.html", tmp_path / "mine"
    elsewhere.write_text("mine")
    if there != "nothing":
        path.parent.mkdir()
    if there == "file":
        path.write_text("old")
    elif there == "FIFO":
        os.mkfifo(path)
    elif "link" in there:
        path.symlink_to(elsewhere if there == "link" else tmp_path / "nowhere")
    files.put(path, "whole")
    assert path.read_text() == "whole" and path.is_file() and not path.is_symlink()
    assert elsewhere.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == [elsewhere, path.parent, path]


def test_what_the_disk_does_not_take_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "README.md"
    path.write_text("old")
    write = Path.write_bytes

    def fills(self: Path, data: bytes) -> int:
        write(self, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills)
    with pytest.raises(
        OSError, match=r"cannot write .*README.md: No space left on device; make room"
    ) as error:
        files.put(path, "new and longer")
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_fifo_among_the_configurations_is_found_before_they_are_composed(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "method").mkdir()
    os.mkfifo(tmp_path / "method/mine.yaml")
    run = script("run")
    for module in (run, script("suite")):
        monkeypatch.setattr(module, "CONF", tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/run.py", *LAYER, f"runs_dir={tmp_path}"])
    assert run.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/method/mine.yaml is not a regular file" in line
    with pytest.raises(ValueError, match="not a regular file"):
        script("suite").experiments("paper", "cpu", tmp_path)
    monkeypatch.setattr(composing, "RECIPES", tmp_path / "method")
    with pytest.raises(ValueError, match="'mine' is none of"):
        composing.recipe("mine", Experts())


@pytest.mark.parametrize("there", ["FIFO", "link"])
def test_a_fit_is_written_over_files_alone(there: str, tmp_path: Path) -> None:
    """Found before anything heavy is loaded: the libraries that write would wait, or write somewhere else."""
    config = compose("task=pretrain", f"runs_dir={tmp_path}", "device=cpu")
    folder = stages.cell.backbone_dir(config)
    path = folder.with_name(f"{folder.name}.checkpoints") / "checkpoint-2/config.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if there == "FIFO" else path.symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"checkpoint-2/config.json is .*: delete it or move it away"):
        stages.run(config, "test")


def test_a_checkpoint_is_made_of_files_alone(tmp_path: Path) -> None:
    folder = save(tiny_model(num_hidden_layers=1), tmp_path / "model")
    # nothing that a checkpoint must hold; transformers would read it, and so would the hash of a cell
    os.mkfifo(folder / "tokenizer.model")
    config = compose("task=latency", f"model.path={folder}", f"runs_dir={tmp_path}", "device=cpu")
    with pytest.raises(ValueError, match=r"tokenizer.model is not a regular file"):
        stages.run(config, "test")


def test_hydra_writes_what_it_composed_through_no_link(tmp_path: Path, capfd) -> None:
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra/multirun.yaml").symlink_to(tmp_path / "mine")
    done = call(capfd, "-m", "seed=0,1", *LAYER, f"runs_dir={tmp_path}")
    assert done.returncode == 2 and "multirun.yaml is a link" in done.stderr
    assert not (tmp_path / "mine").exists()
