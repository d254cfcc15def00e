"""What is measured apart: layers, kernels, drift, traces, scans, backbones and the records themselves."""

import math

import pandas as pd
import pytest

from adafuse.report import apart
from adafuse.report.frames import frames
from adafuse.report.membership import COLUMNS


def blocks(arm, ms):
    words = {"position": 0, "tokens": 64, "block_ms": 64 * ms, "excluded": None, "state": {}}
    return [{"kind": "block", "arm": arm, "round": number, **words} for number in range(2)]


def measured(records, rows=None):
    table = None if rows is None else pd.DataFrame(rows, columns=COLUMNS)
    return apart.measure(frames(records, table))


def values(records, rows=None):
    """By row and quantity, whatever the cell."""
    return {(value.row, value.quantity): value for value in measured(records, rows).values}


def test_a_shared_record_gives_its_numbers_under_each_experiment(made):
    lines = [*blocks("base", 1.0), *blocks("adafuse_switch", 2.0)]
    rows = [[name, "gpu", "latency", "replicate=0", "a"] for name in ("table1", "table6")]
    found = measured([made("a", lines=lines)], rows)
    ratios = [value for value in found.values if value.quantity == "ratio" and value.row == "adafuse_switch"]
    assert [value.experiment for value in ratios] == ["table1", "table6"] and ratios[0].value == ratios[
        1
    ].value
    assert [cell.experiment for cell in found.cells] == ["table1", "table6"]
    assert [row.label for row in found.rows][:3] == ["Backbone", "Backbone (again)", "AdaFuse (switch)"]


def test_cells_of_an_experiment_are_told_apart_by_what_was_overridden(made):
    rows = [
        ["own", "gpu", "latency", f"latency.block_tokens={n} latency.rounds={n}", key]
        for n, key in ((64, "a"), (8, "b"))
    ]
    found = measured([made(key, lines=blocks("base", 1.0)) for key in "ab"], rows)
    assert sorted(cell.cell.split(" paper ")[1] for cell in found.cells) == [
        "latency.block_tokens=64",
        "latency.block_tokens=8",
    ]


def test_a_scan_says_where_its_cells_stand(made):
    records = [
        made(key, lines=blocks("base", 1.0), batch=batch) for key, batch in (("a", 8), ("b", 1), ("c", 1))
    ]
    jobs = [("a", "batch=8 replicate=0"), ("b", "batch=1 replicate=0"), ("c", "batch=1 replicate=1")]
    rows = [["batch_scan", "gpu", "latency", overrides, key] for key, overrides in jobs]
    places = [value for value in measured(records, rows).values if value.quantity == "axis.batch"]
    assert sorted((value.value, value.reason, value.records) for value in places) == [
        (1, "1", ("b", "c")),
        (8, "8", ("a",)),
    ]
    # two things vary: no scan
    rows[0][3] = "batch=8 context=128"
    assert not [value for value in measured(records, rows).values if value.quantity.startswith("axis.")]


def test_a_scan_over_experts_is_ordered_by_linears_then_rank_then_count(made):
    few = {"targets": ["q_proj", "v_proj"], "rank": 64, "count": 8, "top_k": 2}
    records = [made("a", experts=few), made("b")]
    rows = [["module_scan", "gpu", "latency", f"experts={key}", key] for key in "ab"]
    places = sorted(
        (v.value, v.reason) for v in measured(records, rows).values if v.quantity == "axis.experts"
    )
    assert [reason for _, reason in places] == ["q,v r=64 8 experts", "all r=16 8 experts"]


def layer(part, ms):
    return {
        "kind": "layer",
        "sequence_length": 1,
        "rank": 16,
        "phase": "decode",
        "part": part,
        "block": 0,
        "ms": ms,
    }


def test_a_layer_is_adapters_over_backbone_paired_within_a_process(made):
    lines = [layer("backbone", 1.0), layer("adapters", 3.0), layer("both", 4.0), layer("backbone", 1.0)]
    found = values([made(key, "layer", lines) for key in "ab"])
    assert found["decode 1 rank16", "ratio"].value == pytest.approx(3.0)
    assert found["decode 1 rank16", "backbone_ms"].value == 1.0 and found["decode 1 rank16", "ratio"].n == 2


def test_a_kernel_has_its_time_or_the_check_that_it_failed(made):
    line = {
        "kind": "kernel",
        "kernel": "switch",
        "targets": "qv",
        "rank": 8,
        "tokens": None,
        "shape": "",
        "bytes": 10,
    }
    timed = line | {
        "error": 0.1,
        "bound": 0.2,
        "passed": True,
        "ms": 2.0,
        "naive_ms": 8.0,
        "floor_ms": 1.0,
        "share": 0.5,
    }
    failed = timed | {"rank": 16, "passed": False, "ms": None, "naive_ms": None, "error": None}
    error = {"kind": "error", "where": "kernel fused on all", "message": "no room", "traceback": ""}
    found = values([made("a", "kernel", [timed, failed, error])])
    assert (found["switch qv rank8", "ms"].value, found["switch qv rank8", "naive_ratio"].value) == (2.0, 4.0)
    assert (
        found["switch qv rank16", "ms"].reason == "check failed"
        and found["switch qv rank16", "passed"].value == 0
    )
    assert math.isinf(found["switch qv rank16", "error"].value)
    assert found["kernel fused on all", "ms"].reason == "error: no room"


def test_drift_is_a_median_unless_one_process_was_not_finite(made):
    line = {"kind": "drift", "strategy": "switch", "dtype": "bfloat16", "switches": 5, "identical": True}
    errors = {
        "weight_error": 0.1,
        "delta_error": 0.2,
        "logit_error": 0.3,
        "agreement": 1.0,
        "delta_share": 0.05,
    }
    worse = line | errors | {"weight_error": 0.3, "logit_error": None, "identical": False}
    found = values([made("a", "drift", [line | errors]), made("b", "drift", [worse])])
    assert found["switch bfloat16 5", "weight_error"].value == pytest.approx(0.2)
    assert math.isnan(found["switch bfloat16 5", "logit_error"].value)
    assert found["switch bfloat16 5", "identical"].value == 0


def trace(gap_ms):
    line = {"kind": "trace", "arm": "base", "tokens": 5, "launches": 7, "graph_nodes": None, "gap_ms": gap_ms}
    parts = {"base_gemm": 1.0, "switch": 0.5}
    return [
        line | {"parts_ms": parts, "attributed_by": "scopes"},
        {"kind": "spans", "arm": "base", "spans": []},
    ]


def test_a_trace_is_the_token_of_median_length(made):
    records = [
        made(key, "trace", trace(gap), arms=["base", "mola_loop"])
        for key, gap in zip("abc", (0.1, 0.5, 0.3), strict=True)
    ]
    found = values(records)
    assert found["base", "token_ms"].value == pytest.approx(1.8) and found["base", "token_ms"].records == (
        "c",
    )
    assert found["base", "gap_share"].value == pytest.approx(0.3 / 1.8)
    assert found["base", "switch_ms"].value == 0.5 and found["base", "attributed_by"].reason == "scopes"
    assert found["mola_loop", "token_ms"].reason == "not in the record"


def test_a_backbone_by_size_loss_and_checksum(made):
    lines = [
        {"kind": "metric", "suite_task": "text", "metric": "loss", "value": 1.3, "stderr": None, "n": 9},
        {"kind": "parameters", "trainable": 1000},
        {"kind": "artifact", "path": "x", "sha256": "f00", "resumed_from_step": 0},
    ]
    knobs = {"steps": 10, "batch": 2, "accumulation": 1, "max_length": 128}
    found = values([made("a", "pretrain", lines, pretrain=knobs)])
    expected = {"steps": 10, "tokens": 2560, "loss.text": 1.3, "trainable": 1000, "resumed_from_step": 0}
    assert {name: found["a", name].value for name in expected} == expected
    assert found["a", "sha256"].reason == "f00" and found["a", "seconds"].value == 1.5


def test_every_record_has_its_seconds_memory_and_errors(made):
    error = {"kind": "error", "where": "arm base", "message": "no room", "traceback": ""}
    found = values([made("a"), made("b", lines=[error], status="error"), made("c", status="unfinished")])
    assert (found["a", "seconds"].value, found["a", "peak_rss_gib"].value) == (1.5, 0.5)
    assert (found["b", "errors"].value, found["b", "errors"].reason) == (1, "no room")
    assert ("a", "errors") not in found and ("c", "seconds") not in found
