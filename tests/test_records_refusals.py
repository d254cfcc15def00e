"""A record that was cut, edited, doubled or refused by the disk is named in one line, and the others are spared."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse.records import is_done, open_record, partial_path, read
from synthetic.records import HEADER, write_one

ROOT = Path(__file__).resolve().parents[1]


def only_line(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1, -70], ids=lambda k: f"keep{k}")
def test_a_truncated_record_is_refused(tmp_path, keep):
    path = write_one(tmp_path / "cell.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError) as error:
        is_done(path, "cell-hash")
    only_line(error, str(path), "truncated", "delete it and run again")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5", "0.9"),
        ('"status": "ok"', '"status": "error"'),
        ('"seed": 0', '"seed": 1'),
        ('"sha256": "', '"sha256": "0'),
    ],
)
def test_an_edited_record_is_refused(tmp_path, old, new):
    path = write_one(tmp_path / "cell.jsonl")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        is_done(path, "cell-hash")
    only_line(error, str(path), "changed", "delete it and run again")


def test_another_schema_is_refused(tmp_path):
    path = write_one(tmp_path / "cell.jsonl", schema=0)
    with pytest.raises(ValueError, match="has schema 0"):
        read(path)


def test_a_second_writer_is_refused_and_the_first_is_untouched(tmp_path):
    path = tmp_path / "cell.jsonl"
    with open_record(path, HEADER) as record:
        record.write("routing")
        with pytest.raises(ValueError) as error, open_record(path, HEADER):
            pass
        only_line(error, str(path), "another process")
        # and from a process of its own
        partial = str(partial_path(path))
        code = f"from adafuse.locking import lock; from pathlib import Path; lock(Path({partial!r}))"
        other = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert other.returncode != 0 and "another process" in other.stderr
    assert [line["kind"] for line in read(path).lines] == ["run", "routing", "end"]


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_nothing_is_written_through_what_is_no_file(tmp_path, kind):
    elsewhere, partial = tmp_path / "mine", partial_path(tmp_path / "cell.jsonl")
    if kind == "fifo":
        os.mkfifo(partial)
    elif kind == "folder":
        partial.mkdir()
    else:
        partial.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.write_text("mine")
    with pytest.raises(ValueError) as error, open_record(tmp_path / "cell.jsonl", HEADER):
        pass
    only_line(error, str(partial), "delete it")
    assert elsewhere.read_text() == "mine" if kind == "link" else not elsewhere.exists()


def test_the_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "cell.jsonl"
    code = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "from synthetic import runs; from pathlib import Path; from adafuse.records import open_record\n"
        f"with open_record(Path({str(path)!r}), runs.run_fields('latency', 'cell', {{}})):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert partial_path(path).exists() and not path.exists()
    assert is_done(write_one(path), "cell-hash")


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_spares_finished_records(tmp_path, monkeypatch, call):
    finished = write_one(tmp_path / "finished.jsonl")
    path = tmp_path / "cell.jsonl"
    true_write = os.write
    room = [3000]

    def write(descriptor: int, data: bytes) -> int:
        """A disk with `room` bytes left takes what fits, then refuses."""
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = true_write(descriptor, data[: room[0]])
        room[0] -= taken
        return taken

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, {"write": write, "fsync": fsync}[call])
    with pytest.raises(OSError) as error, open_record(path, HEADER) as record:
        for _ in range(200):
            record.write("metric", suite_task="copy", metric="acc", value=0.5, stderr=0.1, n=4)
    only_line(error, str(path), "No space left", "make room", "finished records are untouched")
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not path.exists() and is_done(finished, "cell-hash")
    # the file that stays holds whole lines only, and the cell runs again
    assert all(json.loads(line) for line in partial_path(path).read_text().splitlines())
    assert is_done(write_one(path), "cell-hash")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error, open_record(tmp_path / "file" / "cell.jsonl", HEADER):
        pass
    only_line(error, "cannot write", "runs_dir")
