"""Records: what is written comes back; what was cut, edited, doubled or refused by the disk is named in one
line.
"""

import errno
import json
import math
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

import synthetic
from adafuse import records
from adafuse.frames import frame
from adafuse.records import is_done, load, open_record, partial_path, read

HEADER = synthetic.run_fields("latency", "cell", synthetic.config())
ROOT = Path(__file__).resolve().parents[1]


def write_one(path: Path, **changes) -> Path:
    with open_record(path, HEADER | changes) as record:
        record.write("metric", suite_task="copy", metric="acc", value=0.5, stderr=0.1, n=4)
    return path


def only_line(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_lines_come_back_in_order_with_header_and_end(tmp_path):
    record = read(write_one(tmp_path / "a" / "cell.jsonl"))
    assert [line["kind"] for line in record.lines] == ["run", "metric", "end"]
    assert record.status == "ok"
    assert record.run["cell_id"] == "cell" and record.run["schema"] == records.SCHEMA
    assert record.lines[-1]["seconds"] >= 0 and record.lines[-1]["peak_rss_gib"] > 0
    assert not partial_path(record.path).exists()


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "cell.jsonl"
    with open_record(path, HEADER) as record:
        record.write("metric", suite_task="copy", metric="acc", value=0.5, stderr=0.1, n=4)
        unfinished = read(partial_path(path))
        assert unfinished.status == "unfinished" and len(unfinished.lines) == 2
        assert not path.exists()


def test_values_become_plain_json(tmp_path):
    colour = Enum("Colour", "red")
    with open_record(tmp_path / "cell.jsonl", HEADER) as record:
        record.write(
            "routing",
            array=np.arange(2),
            number=np.float32(0.5),
            path=Path("x"),
            bad=math.nan,
            enum=colour.red,
        )
    line = json.loads((tmp_path / "cell.jsonl").read_text().splitlines()[1])
    assert line == {
        "kind": "routing",
        "array": [0, 1],
        "number": 0.5,
        "path": "x",
        "bad": None,
        "enum": "red",
    }


def test_a_line_without_its_fields_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="block"), open_record(tmp_path / "c.jsonl", HEADER) as record:
        record.write("block", arm="base")


def test_done_only_with_the_same_hash(tmp_path):
    path = write_one(tmp_path / "cell.jsonl")
    assert is_done(path, "cell-hash")
    assert not is_done(path, "another-hash")
    assert not is_done(tmp_path / "absent.jsonl", "cell-hash")


def test_an_exception_is_a_record_and_is_raised_again(tmp_path):
    path = tmp_path / "cell.jsonl"
    with pytest.raises(RuntimeError, match="first"), open_record(path, HEADER):
        raise RuntimeError("first\nsecond")
    record = read(path)
    assert record.status == "error"
    (error,) = record.of("error")
    assert error["where"] == "latency" and error["message"] == "RuntimeError: first second"
    assert "Traceback" in error["traceback"]
    assert not is_done(path, "cell-hash")


def test_a_failed_arm_lets_the_cell_go_on(tmp_path):
    with open_record(tmp_path / "cell.jsonl", HEADER) as record:
        record.fail("arm x", ValueError("no"))
        record.write("routing")
    assert [line["kind"] for line in read(tmp_path / "cell.jsonl").lines] == [
        "run",
        "error",
        "routing",
        "end",
    ]
    assert read(tmp_path / "cell.jsonl").status == "error"


def test_an_error_record_is_replaced_by_a_better_one(tmp_path):
    path = tmp_path / "cell.jsonl"
    with pytest.raises(RuntimeError), open_record(path, HEADER):
        raise RuntimeError
    write_one(path)
    assert is_done(path, "cell-hash")


def test_an_interrupt_leaves_the_file_unfinished(tmp_path):
    path = tmp_path / "cell.jsonl"
    with pytest.raises(KeyboardInterrupt), open_record(path, HEADER):
        raise KeyboardInterrupt
    assert not path.exists() and read(partial_path(path)).status == "unfinished"
    assert not is_done(path, "cell-hash")


def test_what_a_killed_process_left_is_replaced(tmp_path):
    path = tmp_path / "cell.jsonl"
    partial_path(path).write_text('{"kind": "run", "half a li')
    assert read(partial_path(path)).lines == []
    write_one(path)
    assert is_done(path, "cell-hash") and not partial_path(path).exists()


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


def test_the_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "cell.jsonl"
    code = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "import synthetic; from pathlib import Path; from adafuse.records import open_record\n"
        f"with open_record(Path({str(path)!r}), synthetic.run_fields('latency', 'cell', {{}})):\n"
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


def test_load_reads_all_statuses_and_copies_once(tmp_path):
    write_one(tmp_path / "a" / "one.jsonl")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "copy.jsonl").write_bytes((tmp_path / "a" / "one.jsonl").read_bytes())
    partial_path(tmp_path / "a" / "two.jsonl").write_text("")
    # a cell that runs again keeps its old record until it has finished
    partial_path(tmp_path / "a" / "one.jsonl").write_text("")
    found = load([tmp_path / "a", tmp_path / "b"])
    assert [(r.path.name, r.status) for r in found] == [
        ("one.jsonl", "ok"),
        ("two.jsonl.partial", "unfinished"),
    ]
    with pytest.raises(ValueError, match="no such folder"):
        load([tmp_path / "absent"])


def test_frame_joins_the_header(tmp_path):
    found = load([write_one(tmp_path / "one.jsonl", replicate=2)])
    table = frame(found, "metric")
    assert table.loc[0, ["cell_id", "machine", "replicate", "value"]].tolist() == ["cell", "cpu", 2, 0.5]
    assert "kind" not in table
    assert list(frame(found, "loss")["step"]) == []
