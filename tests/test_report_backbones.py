"""The backbones' table: a row a record, GPUs first, what it took and by which checksum to know it."""

from pathlib import Path

import synthetic_study as study
from adafuse.records import load
from adafuse.report import all_sheets, find
from adafuse.report.backbones import backbone_table, tokens_seen
from adafuse.report.sheet import markdown


def test_a_row_for_each_backbone_with_its_losses_and_checksum(tmp_path: Path) -> None:
    cpu = study.GPU | {"name": "cpu", "gpu": None, "cpu": "Some CPU", "cores": 2}
    study.write_pretraining(tmp_path, "tiny", cpu, losses={"text": 2.06, "lessons": 0.7})
    sizes = {"pretrain.batch": 64, "pretrain.accumulation": 2, "pretrain.max_length": 256}
    how = {"sha256": "0123456789abcdef" * 4, "resumed_from_step": 3000, "parameters": 78_518_016}
    study.write_pretraining(tmp_path, "medium", steps=4000, losses={"text": 1.3}, changes=sizes, **how)
    (section,) = backbone_table(load([tmp_path])).sections
    medium, tiny = ({name: show(row) for name, show in section.columns.items()} for row in section.rows)
    assert list(medium.values())[:6] == ["medium", "78.5 M", "4,000", "131 M", "1.30", "–"]
    assert medium["resumed from step"] == "3,000" and medium["sha256"] == "0123456789ab"
    assert medium["machine"] == "NVIDIA H200" and float(medium["seconds"]) >= 0
    assert tiny["held-out loss, text"] == "2.06" and tiny["held-out loss, lessons"] == "0.700"
    assert tiny["tokens"] == "–" and tiny["machine"] == "CPU, Some CPU, 2 cores"
    assert "note" not in medium and section.rows[0]["records"][0].startswith("pretrain/medium-s0")


def test_an_unfinished_record_says_so(tmp_path: Path) -> None:
    path = study.write_pretraining(tmp_path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    path.unlink()
    text = markdown(backbone_table(load([tmp_path])))
    assert "unfinished record: run the same command again" in text


def test_tokens_are_known_only_where_all_factors_are() -> None:
    knobs = {"steps": 10, "batch": 4, "accumulation": 2, "max_length": 8}
    assert tokens_seen({"pretrain": knobs}) == 640
    assert tokens_seen({"pretrain": {k: v for k, v in knobs.items() if k != "batch"}}) is None


def test_without_pretraining_the_table_says_what_to_run(tmp_path: Path) -> None:
    study.write_fit(tmp_path)
    found = {table.name: table for table in all_sheets(find(load([tmp_path])))}
    assert "task=pretrain" in markdown(found["backbones"])
