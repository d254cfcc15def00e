"""archive.py: what is packed comes out byte for byte, what is no record is named, and only one record bears a name."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adafuse import archive
from adafuse.archive import load, pack, unpack, verify
from adafuse.records import open_record, partial_path
from synthetic.configurations import ROOT
from synthetic.records import HEADER, STRAY, write_one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three records of two machines and two tasks."""
    write_one(tmp_path / "records" / "latency" / "one.jsonl")
    write_one(tmp_path / "records" / "latency" / "two.jsonl", seed=1, machine={"name": "h200"})
    write_one(tmp_path / "records" / "train" / "three.jsonl", task="train")
    return tmp_path / "records"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.jsonl")}


def test_records_come_out_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    written = pack([folder], tmp_path / "reference")
    assert [str(path.relative_to(tmp_path / "reference")) for path in written] == [
        "cpu/latency.parquet",
        "cpu/train.parquet",
        "h200/latency.parquet",
    ]
    assert unpack(tmp_path / "reference", tmp_path / "out") == 3
    assert contents(tmp_path / "out") == contents(folder)
    assert (tmp_path / "out" / "h200" / "latency" / "two.jsonl").is_file()
    assert verify(tmp_path / "reference") == 3
    # a machine's folder of archives becomes a folder of records, as a run looks for them
    assert unpack(tmp_path / "reference" / "cpu", tmp_path / "runs") == 2
    assert (tmp_path / "runs" / "train" / "three.jsonl").is_file()


def test_the_same_records_give_the_same_bytes_and_are_packed_once(folder: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        pack([folder], tmp_path / out)
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.parquet")]
    assert len(names) == 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert pack([folder, tmp_path / "b"], tmp_path / "a") == []
    write_one(folder / "latency" / "four.jsonl", seed=4)
    assert [path.name for path in pack([folder / "latency" / "four.jsonl"], tmp_path / "a")] == [
        "latency.parquet"
    ]
    assert len(load([tmp_path / "a"]).records) == 4


def test_a_header_costs_little(tmp_path: Path) -> None:
    for seed in range(50):
        write_one(tmp_path / "records" / f"{seed}.jsonl", seed=seed)
    (written,) = pack([tmp_path / "records"], tmp_path / "out")
    assert written.stat().st_size < sum(map(len, contents(tmp_path / "records").values())) / 15


def test_an_archive_is_read_as_its_folder_would_be(folder: Path, tmp_path: Path) -> None:
    pack([folder], tmp_path / "out")
    packed = load([tmp_path / "out"])
    assert packed.left_out == []
    by_name = {record.path.name: record for record in load([folder]).records}
    for record in packed.records:
        other = by_name[record.path.name]
        assert (record.run, record.lines, record.status) == (other.run, other.lines, other.status)
    assert packed.records[0].path == tmp_path / "out" / "cpu" / "latency" / "one.jsonl"
    assert len(load([tmp_path / "out", folder]).records) == 3, "identical copies are one"


def test_load_reads_all_statuses_and_copies_once(tmp_path: Path) -> None:
    write_one(tmp_path / "a" / "one.jsonl")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "copy.jsonl").write_bytes((tmp_path / "a" / "one.jsonl").read_bytes())
    with pytest.raises(KeyboardInterrupt), open_record(tmp_path / "a" / "two.jsonl", HEADER):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), open_record(tmp_path / "a" / "wrong.jsonl", HEADER):
        raise RuntimeError
    # a cell that runs again keeps its old record until it has finished
    partial_path(tmp_path / "a" / "one.jsonl").write_text("")
    found = load([tmp_path / "a", tmp_path / "b"])
    assert [(r.path.name, r.status) for r in found.records] == [
        ("one.jsonl", "ok"),
        ("two.jsonl.partial", "unfinished"),
        ("wrong.jsonl", "error"),
    ]
    assert found.left_out == []
    with pytest.raises(ValueError, match="no such folder"):
        load([tmp_path / "absent"])


@pytest.mark.parametrize("what", STRAY)
def test_a_stray_file_is_named_and_left_out(what: str, folder: Path) -> None:
    name, make = STRAY[what]
    make(folder / "latency" / name)
    found = load([folder])
    assert len(found.records) == 3
    (line,) = found.left_out
    assert str(folder / "latency" / name) in line and "\n" not in line and len(line) < 400
    if (folder / "latency" / name).exists():
        assert load([folder / "latency" / name]).records == []


def test_an_edited_record_is_left_out_and_never_published(folder: Path, tmp_path: Path) -> None:
    path = folder / "latency" / "one.jsonl"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 9', 1))
    found = load([folder])
    assert len(found.records) == 2 and "was changed after it was written" in found.left_out[0]
    with pytest.raises(ValueError, match=r"one\.jsonl was changed after it was written"):
        pack([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dirty": True}, "no commit: commit them, measure again"),
        ({"dirty": None}, "no commit: commit them, measure again"),
        ({"machine": {}}, "names no machine"),
        ({"machine": {"name": "../.."}}, "names no machine"),
        ({"task": "a/b"}, "names no machine and task"),
    ],
    ids=str,
)
def test_what_is_not_published(changes: dict, message: str, tmp_path: Path) -> None:
    write_one(tmp_path / "records" / "fine.jsonl")
    write_one(tmp_path / "records" / "not.jsonl", **changes)
    with pytest.raises(ValueError, match=message) as error:
        pack([tmp_path / "records"], tmp_path / "out")
    assert "not.jsonl" in str(error.value) and not (tmp_path / "out").exists()


def test_an_unfinished_record_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_record(tmp_path / "records" / "two.jsonl", HEADER):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="is unfinished"):
        pack([tmp_path / "records"], tmp_path / "out")


def test_two_different_records_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    pack([folder], tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")}
    write_one(tmp_path / "again" / "one.jsonl", seed=1)
    for sources in ([tmp_path / "again"], [tmp_path / "again", folder]):
        with pytest.raises(ValueError, match=r"two different records are called one\.jsonl"):
            pack(sources, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")} == before
    (tmp_path / "there" / "cpu" / "latency").mkdir(parents=True)
    (tmp_path / "there" / "cpu" / "latency" / "one.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is there and differs"):
        unpack(tmp_path / "out", tmp_path / "there")


def test_a_replicate_of_one_number_on_each_card(tmp_path: Path) -> None:
    """Records of one name from two cards lie side by side; two of one card do not, nor two fits of one cell."""
    name = "cell-s0-r0-aaaaaaaaaaaa.jsonl"
    for folder, card in (("one", "1" * 12), ("two", "2" * 12)):
        write_one(tmp_path / folder / name, machine={"name": "h200", "gpu_id": card})
        write_one(tmp_path / f"{folder} fit" / name, machine={"name": "h200", "gpu_id": card}, task="train")
    pack([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    names = [f"{name.removesuffix('.jsonl')}.{card * 12}.jsonl" for card in "12"]
    assert [row.name for row in archive.rows(tmp_path / "out" / "h200" / "latency.parquet")] == names
    assert unpack(tmp_path / "out", tmp_path / "again") == 2
    assert pack([tmp_path / "again", tmp_path / "two"], tmp_path / "out") == [], "packed once, under any name"
    unpacked = contents(tmp_path / "again")
    assert unpacked == {
        names[0]: contents(tmp_path / "one")[name],
        names[1]: contents(tmp_path / "two")[name],
    }
    write_one(tmp_path / "later" / name, machine={"name": "h200", "gpu_id": "1" * 12}, seed=1)
    for sources in ([tmp_path / "later"], [tmp_path / "one fit", tmp_path / "two fit"]):
        with pytest.raises(ValueError, match="two different records are called cell-s0-r0"):
            pack(sources, tmp_path / "out")


def damaged(path: Path, change: str) -> None:
    """One byte of the file, or one column of its first row."""
    if change in ("cut", "byte"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 255
        path.write_bytes(data if change == "byte" else data[:-20])
        return
    table = pq.read_table(path).to_pydict()
    table[change][0] = {"name": "../out.jsonl", "sha256": "0" * 64, "content": b"{}"}[change]
    pq.write_table(pa.table(table, schema=archive.COLUMNS), path)


@pytest.mark.parametrize("change", ["cut", "byte", "name", "sha256", "content"])
def test_a_damaged_archive_is_named_and_the_others_are_read(
    change: str, folder: Path, tmp_path: Path
) -> None:
    pack([folder], tmp_path / "out")
    damaged(tmp_path / "out" / "cpu" / "latency.parquet", change)
    found = load([tmp_path / "out"])
    assert len(found.records) == 2
    (line,) = found.left_out
    assert "cpu/latency" in line and "damaged" in line and "restore" in line and "\n" not in line
    for refused in (verify, lambda out: unpack(out, tmp_path / "o"), lambda out: pack([folder], out)):
        with pytest.raises(ValueError, match="damaged"):
            refused(tmp_path / "out")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_record_in_the_wrong_archive_is_found(folder: Path, tmp_path: Path) -> None:
    pack([folder], tmp_path / "out")
    (tmp_path / "out" / "cpu" / "latency.parquet").replace(tmp_path / "out" / "cpu" / "train.parquet")
    with pytest.raises(ValueError, match="of another machine or task"):
        verify(tmp_path / "out")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\x8d"))
    table = pa.table({"name": text, "sha256": pa.array(["0"]), "content": pa.array([b""])})
    pq.write_table(table, tmp_path / "latency.parquet")
    with pytest.raises(ValueError, match=r"latency\.parquet is damaged, or no archive"):
        archive.rows(tmp_path / "latency.parquet")
    assert "latency.parquet" in load([tmp_path]).left_out[0]


def test_the_published_records_come_out_as_they_were_written(tmp_path: Path) -> None:
    """A sample, to the byte; `python -m adafuse.archive verify results/reference` looks at all of them."""
    reference = ROOT / "results" / "reference"
    assert len(list(reference.rglob("*.parquet"))) == 17 and not list(reference.rglob("*.jsonl"))
    published = [
        path for path in (ROOT / "results").rglob("*") if path.is_file() and "runs" not in path.parts
    ]
    assert len(published) <= 250 and sum(path.stat().st_size for path in published) <= 15e6
    assert sum(len(archive.rows(path)) for path in reference.rglob("*.parquet")) == 3013
    assert unpack(reference / "cpu" / "latency.parquet", tmp_path) == 11
    assert {
        name[-18:-6]: hashlib.sha256(data).hexdigest()[:16] for name, data in contents(tmp_path).items()
    } == {
        "4f1ef8881236": "a34f0e9e5e7b2ec1",
        "548b76402fb3": "1383ae42d348bee1",
        "840cb50073a2": "699eafe31aba2d9b",
        "1dad05c1c8e5": "a36f6bcad0b7a712",
        "b7b7bbc22b04": "a4027cf61f03b53d",
        "72ba9bfba6e5": "129696e4183a8efb",
        "a043e05b4362": "ee0454b6a6fde4ec",
        "e96bfc533c5c": "084679b6f31da87f",
        "46cb7bb588dc": "c2818123b9658664",
        "5ce450ddeb44": "02a665b1fc450d65",
        "36387624f2b4": "912b5e49bca73499",
    }
    assert verify(reference / "h200" / "latency.parquet") == 133


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert archive.main(["pack", str(folder), "--out", out]) == 0
    assert capsys.readouterr().out.count("packed: ") == 3
    assert archive.main(["pack", str(folder), "--out", out]) == 0
    assert capsys.readouterr().out == "nothing new\n"
    assert archive.main(["list", out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}/h200/latency/two.jsonl"
    assert archive.main(["verify", out]) == 0
    assert capsys.readouterr().out.startswith("3 records")
    assert archive.main(["unpack", out, "--out", str(tmp_path / "unpacked")]) == 0
    assert archive.main(["verify", str(tmp_path / "absent")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no such folder") and said.count("\n") == 1


def test_reading_needs_neither_torch_nor_pandas() -> None:
    code = "import sys; import adafuse.archive; print({'torch', 'pandas', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read all, so the refusal is made up."""
    write_one(tmp_path / "latency/cell.jsonl")
    closed, listed = write_one(tmp_path / "train/cell.jsonl").parent, os.scandir

    def scandir(path: str | Path) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = archive.load([tmp_path])
    assert len(found.records) == 1 and found.left_out == [f"{closed} cannot be read: Permission denied"]
    with pytest.raises(PermissionError):
        archive.pack([tmp_path], tmp_path / "packed")
