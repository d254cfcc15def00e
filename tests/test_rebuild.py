"""rebuild.py: the rows that running an experiment writes are found again from its records, and no record is lost."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from adafuse import cell, membership, rebuild
from adafuse.records import Record, open_record, read
from synthetic.configurations import compose, read_once
from synthetic.records import HEADER


@pytest.fixture(autouse=True)
def composed_quickly() -> Iterator[None]:
    with read_once():
        yield


def made(
    folder: Path, known: str, task: str = "evaluate", command: str = "seed=0", **changes: object
) -> Record:
    path = folder / f"{known}.jsonl"
    header = {"task": task, "config_hash": known, "command": f"python scripts/run.py {command}", **changes}
    with open_record(path, HEADER | header):
        pass
    return read(path)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """An evaluation of generation_drift with the fit below it, and three that no sweep asks for."""
    config = compose("experiment=generation_drift", "seed=1", "evaluate_dtype=float16")
    fit = next(one for one in cell.needs(config) if one.task.name == "train")
    more = compose("experiment=generation_drift", "seed=1", "evaluate_dtype=float16", "train.steps=7")
    return [
        made(tmp_path, cell.former_hashes(config)[-1], experiment="elsewhere"),
        made(tmp_path, cell.cell_hash(fit), "train", experiment="generation_drift"),
        made(
            tmp_path,
            cell.cell_hash(more),
            command="seed=1 evaluate_dtype=float16 experiment=generation_drift train.steps=7 batch=1 runs_dir=x",
            experiment="generation_drift",
        ),
        made(tmp_path, "feedfeedfeed", command="task=layer model.token=abc", task="layer", experiment=None),
    ]


def test_rows_are_found_again(records: list[Record], tmp_path: Path) -> None:
    rows = rebuild.rebuild(records, ["cpu"], ["generation_drift"])
    own = "seed=1 evaluate_dtype=float16"
    assert [(row.experiment, row.task, row.overrides, row.record) for row in rows] == [
        # the fit below another job of the sweep as well
        ("generation_drift", "train", "seed=1 evaluate_dtype=bfloat16", records[1].run["config_hash"]),
        ("generation_drift", "evaluate", own, records[0].run["config_hash"]),
        ("generation_drift", "train", own, records[1].run["config_hash"]),
        ("elsewhere", "evaluate", "seed=0", records[0].run["config_hash"]),
        ("generation_drift", "evaluate", f"{own} train.steps=7", records[2].run["config_hash"]),
        ("", "layer", "task=layer model.token=***", "feedfeedfeed"),
    ]
    assert membership.unlisted(records, rows) == []
    rebuild.write(tmp_path / "m.csv", rows, records)
    with (tmp_path / "m.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["machine"] for row in written] == ["cpu"] * 6
    assert membership.read(tmp_path / "m.csv") == rows


def test_a_record_of_older_arms_keeps_its_rows(tmp_path: Path) -> None:
    """It no longer stands for the cell, and still is what the experiments were measured by."""
    (older, *_) = cell.outdated_hashes(compose("experiment=table1", "replicate=1"))
    record = made(tmp_path, older, "latency", experiment="table1")
    rows = rebuild.rebuild([record], ["cpu"], ["table1", "table6"])
    assert [(row.experiment, row.overrides, row.record) for row in rows] == [
        (name, "replicate=1", older) for name in ("table1", "table6")
    ]


def test_a_sweep_is_what_hydra_makes_of_it() -> None:
    import hydra

    from adafuse import compose as schema

    schema.register()
    with hydra.initialize_config_dir(str(rebuild.CONF), version_base="1.3"):
        jobs = list(rebuild._jobs("table2", "cpu"))
        assert len(jobs) == 45 and jobs[0] == ["seed=0", "method=base"] and jobs[-1][0] == "seed=4"
        assert list(rebuild._jobs("table2", "no_such_profile")) == []
        assert rebuild._keys("table2", "cpu", ["method=pesc", "evaluate_strategy=switch"]) == []
        made = rebuild._config("figure1", "cpu", ["seed=3", "batch=2", "replicate=1"])
    assert made == compose("experiment=figure1", "seed=3", "batch=2", "replicate=1")


def test_the_command_line(records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    out = tmp_path / "out" / "membership.csv"
    (tmp_path / "stray.jsonl").write_text("{}")
    arguments = [folder, "--profiles", "cpu", "--experiments", "figure1", "--out", str(out)]
    assert rebuild.main(arguments) == 0
    said = capsys.readouterr().out
    assert "stray.jsonl is truncated" in said and "4 rows for 4 records" in said
    assert rebuild.main([str(tmp_path / "absent"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: no such folder")
