"""membership.csv: every row once, whole, by many writers at a time, and nothing in it that is nobody's business."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse import cell
from adafuse.membership import FILE, Row, append, job_overrides, note, read, shown, unlisted
from adafuse.records import read as read_record
from synthetic import records as made_records
from synthetic.configurations import ROOT, compose

ROW = Row("table2", "cpu", "evaluate", "seed=0 method=mola", "0123456789ab")


def test_a_job_and_all_that_it_stands_on_get_a_row_each_once(tmp_path: Path) -> None:
    config = compose("task=evaluate", "method=mola", f"runs_dir={tmp_path}")
    command = f"python scripts/run.py seed=0 method=mola experiment=table2 profile=cpu runs_dir={tmp_path}"
    for _ in range(2):
        note(config, command, "table2")
    file = tmp_path / "records" / FILE
    assert file.read_text().splitlines()[0] == "experiment,profile,task,overrides,record"
    assert read(file) == [
        Row("table2", "cpu", one.task.name, "seed=0 method=mola", cell.cell_hash(one))
        for one in (config, *cell.needs(config))
    ]
    note(config, command, None)
    assert len(read(file)) == 6 and read(file)[-1].experiment == ""
    # the next job stands on the same backbone, which has its row
    other = compose("task=evaluate", "method=mola", "seed=1", f"runs_dir={tmp_path}")
    note(other, command.replace("seed=0", "seed=1"), "table2")
    assert [(row.task, row.overrides) for row in read(file)[6:]] == [
        ("evaluate", "seed=1 method=mola"),
        ("train", "seed=1 method=mola"),
    ]


def test_a_row_names_the_record_that_is_there(tmp_path: Path) -> None:
    config = compose("task=evaluate", "method=base", f"runs_dir={tmp_path}")
    former = cell.former_hashes(config)[-1]
    path = cell.record_path(config)
    made_records.write_one(path.with_name(path.name.replace(cell.cell_hash(config), former)))
    note(config, "python scripts/run.py method=base", None)
    assert [row.record for row in read(tmp_path / "records" / FILE) if row.task == "evaluate"] == [former]


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        (
            "seed=0 method=adafuse experiment=table2 profile=gpu tracker=wandb device=cpu hydra/launcher=x",
            "seed=0 method=adafuse",
        ),
        ("-m runs_dir=x ++hydra.job.chdir=false train.steps=3 +train.bf16=true", "train.steps=3 +train.bf16=true"),
        ("'kernel.tokens=[1, 2]' data.families=[copy]", "'kernel.tokens=[1, 2]' data.families=[copy]"),
        ("latency.block_tokens=128 arms=token", "latency.block_tokens=128 arms=token"),
        ("", ""),
    ],
)  # fmt: skip
def test_overrides_are_the_jobs_own(command: str, overrides: str) -> None:
    assert job_overrides(f"python scripts/run.py {command}") == overrides


SECRET = "s" + "k-abcdef0123456789"


@pytest.mark.parametrize(
    "override",
    [
        "model.token=abc",
        "+tracker.api_key=abc",
        "++hub.Password=abc",
        "a.my-secret=abc",
        "+hub={name:x,api_key:abc}",
        f"model.hub_id={SECRET}",
        "model.hub_id=hf_" + "A" * 34,
        "model.path=${oc.env:HOME}",
        "'model.path=${oc.env:HOME,none}'",
        "data.path=https://me:pass@example.org/x",
        "model.hub_id=" + "0123456789abcdef" * 2 + "01234567",
        "model.name=in-the-environment",
    ],
)
def test_no_secret_is_written(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "in-the-environment")
    key, _, value = override.strip("'").partition("=")
    assert shown(override.strip("'")) == f"{key}=***"
    config = compose("task=layer", f"runs_dir={tmp_path}")
    note(config, f"python scripts/run.py seed=1 {override}", None)
    written = (tmp_path / "records" / FILE).read_text()
    assert value not in written and f"seed=1 {key}=***" in written


@pytest.mark.parametrize(
    "override",
    [
        "model.revision=" + "0123456789abcdef" * 2 + "01234567",
        "latency.check_tokens=64",
        "latency={block_tokens:64}",
        "kernel.tokens=[1,2]",
        "arms=token",
        "model.path=/home/me/models--meta-llama--Llama-2-7b-hf",
        "model.hub_id=HuggingFaceTB/SmolLM2-135M-Instruct",
        "experts.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    ],
)
def test_what_is_no_secret_is_written(override: str) -> None:
    assert shown(override) == override


def test_half_a_line_goes_and_a_line_that_is_none_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / FILE
    append(file, [ROW])
    whole = file.read_bytes()
    file.write_bytes(whole + b"only,three,words\n" + b"table2,cpu,evalu")
    assert read(file) == [ROW]
    other = Row("", "cpu", "layer", "a 'b, c'", "ba9876543210")
    append(file, [ROW, other, other])
    assert read(file) == [ROW, other]
    assert file.read_bytes().startswith(whole + b'only,three,words\n,cpu,layer,"a ')
    # the published file says more
    file.write_text(
        "experiment,profile,task,overrides,record,machine\n" + ",".join([*vars(ROW).values(), "h200"]) + "\n"
    )
    assert read(file) == [ROW]


def test_many_writers_at_a_time_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from adafuse.membership import Row, append\n"
        "for i in range(40):\n"
        "    append(Path(sys.argv[1]), [Row('', 'cpu', 'layer', f'seed={i}', who) for who in (sys.argv[2], 'all')])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / FILE)]
    writers = [
        subprocess.Popen([*command, name], env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
        for name in "abc"
    ]
    assert [one.wait() for one in writers] == [0, 0, 0]
    rows = read(tmp_path / FILE)
    assert len(rows) == len(set(rows)) == 40 * 4
    assert len((tmp_path / FILE).read_text().splitlines()) == 1 + 40 * 4


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "records").write_text("")
    with pytest.raises(OSError, match="cannot write .*; make room or choose another folder") as error:
        append(tmp_path / "records" / FILE, [ROW])
    assert "\n" not in str(error.value)
    os.mkfifo(tmp_path / FILE)
    with pytest.raises((OSError, ValueError)) as error:
        append(tmp_path / FILE, [ROW])
    assert "\n" not in str(error.value)


def test_a_record_without_a_row_is_listed(tmp_path: Path) -> None:
    one, two = (
        read_record(made_records.write_one(tmp_path / f"{name}.jsonl", config_hash=name)) for name in "ab"
    )
    rows = [Row("table2", "cpu", "latency", "", "a")]
    assert unlisted([one, two], rows) == [two]
