"""Records: what is written comes back, line by line, and only a whole record of the same cell counts as done."""

import json
import math
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from adafuse import records
from adafuse.records import is_done, open_record, partial_path, read
from synthetic.records import HEADER, write_one


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
    assert "Traceback" in error["traceback"] and "tests/test_records.py" in error["traceback"]
    assert str(Path(__file__).parent) not in path.read_text(), "where the clone lies is nobody's business"
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


def test_the_lines_of_a_kind_are_parsed_from_the_bytes(tmp_path):
    with open_record(tmp_path / "cell.jsonl", HEADER) as record:
        record.write("routing", said='{"kind": "metric"', more=1)
        record.write("routing", more=2)
        record.write("metric", suite_task="copy", metric="acc", value=0.5, stderr=0.1, n=4)
    found = read(tmp_path / "cell.jsonl")
    for kind in ("run", "routing", "metric", "end", "block"):
        assert found.of(kind) == [line for line in found.lines if line["kind"] == kind]
    assert [line["more"] for line in found.of("routing")] == [1, 2]
    assert found.of("run") == [found.run]
