"""The kernel table: a section per backbone and dtype, and no number where a check failed."""

import pytest

from adafuse.records import load, partial_path
from adafuse.report import draw, find, kernels, sheet
from synthetic_gpu import kernel_line, write_kernels


def table(folder) -> sheet.Sheet:
    return kernels.kernel_table(find(load([folder])).kernels)


def test_a_line_becomes_a_row(tmp_path):
    write_kernels(
        tmp_path, [kernel_line(), kernel_line("gather", 0.5, floor_ms=0.4, share=0.8, naive_ms=5.0)]
    )
    (section,) = table(tmp_path).sections
    assert section.heading == "NVIDIA H200 · llama2_7b, bfloat16 · 8 experts, top-2"
    switch, gather = section.rows
    assert switch["naive_ratio"] == pytest.approx(40 / 6.9) and gather["naive_ratio"] == 10
    shown = [{name: show(row) for name, show in section.columns.items()} for row in section.rows]
    assert shown[0]["tokens"] == "–" and shown[1]["tokens"] == "1"
    assert shown[1]["of bandwidth"] == "80 %" and shown[1]["floor ms"] == "0.400"
    assert shown[0]["check"] == "0.002, bound 0.01"
    assert switch["records"] == ["kernel/llama2_7b.jsonl"]


def test_a_failed_check_shows_no_time(tmp_path):
    write_kernels(tmp_path, [kernel_line(ms=None), kernel_line(ms=None, error=None)])
    (section,) = table(tmp_path).sections
    for row, said in zip(section.rows, ("failed: 0.5, bound 0.01", "failed: none, bound 0.01"), strict=True):
        shown = {name: show(row) for name, show in section.columns.items()}
        assert shown["check"] == said
        assert {shown[name] for name in ("ms", "GB/s", "of bandwidth", "naive / kernel")} == {"–"}


def test_what_naive_does_not_have_is_a_gap(tmp_path):
    write_kernels(tmp_path, [kernel_line("library_linear", 3.0, naive_ms=None, rank=None)])
    (row,) = table(tmp_path).sections[0].rows
    assert row["naive_ratio"] is None and "None" not in sheet.markdown(table(tmp_path))


def test_models_are_sections_and_an_error_is_named(tmp_path):
    write_kernels(tmp_path, [kernel_line()])
    write_kernels(tmp_path, [kernel_line(model="small")], "small", failed=["kernel fused"])
    one, two = table(tmp_path).sections
    assert "llama2_7b" in one.heading and "small" in two.heading
    assert one.notes == [] and two.notes == ["Not measured: kernel fused: RuntimeError: out of memory"]


def test_an_unfinished_record_gives_its_reason(tmp_path):
    path = write_kernels(tmp_path, [kernel_line()])
    path.rename(partial_path(path))
    assert "unfinished record" in sheet.markdown(table(tmp_path)) and "6.90" not in sheet.markdown(
        table(tmp_path)
    )


def test_it_is_written_with_plain_numbers(tmp_path):
    write_kernels(tmp_path / "records", [kernel_line()])
    draw(find(load([tmp_path / "records"])), tmp_path)
    text = (tmp_path / "tables" / "kernels.csv").read_text()
    assert "naive_ratio" in text and "5.7971" in text
