"""What is timed or counted: every number from records whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest

from adafuse.report import latency
from adafuse.report.frames import frames
from adafuse.report.membership import COLUMNS
from synthetic.report import GPU

STATE = {"sm_mhz": 1980.0, "power_w": 400.0, "foreign_processes": 0}


def block(arm, number, ms, excluded=None, **state):
    words = {"position": 0, "tokens": 64, "block_ms": 64 * ms, "excluded": excluded, "state": STATE | state}
    return {"kind": "block", "arm": arm, "round": number, **words}


def check(arm, name="logits", value=0.1, bound=1.0, passed=True):
    return {
        "kind": "check",
        "arm": arm,
        "check": name,
        "value": value,
        "bound": bound,
        "passed": passed,
        "detail": "d",
    }


def cost(arm, floor_ms=0.5):
    sizes = {"params": 100, "macs": 90, "adapter_params": 10, "bytes_per_token": 2e9, "floor_ms": floor_ms}
    return {"kind": "cost", "arm": arm, **sizes}


def process(times, offset=1.0):
    """The blocks of one process: `times` is ms per token of every round, by arm."""
    return [block(arm, number, ms * offset) for arm, own in times.items() for number, ms in enumerate(own)]


def values(records, *experiments):
    """By row and quantity; of these experiments, of all without any."""
    found = latency.measure(frames(records))
    rows = found.values.astype({"n": object}).itertuples(index=False)
    own = [value for value in rows if value.experiment in experiments or not experiments]
    return {(value.row, value.quantity): value for value in own}


TIMES = {"base": [1.0, 1.1, 1.2], "base_again": [1.0, 1.1, 1.2], "adafuse_switch": [2.0, 2.2, 2.4]}


def test_a_ratio_is_paired_by_round_and_its_interval_is_over_processes(made):
    faster = {**TIMES, "adafuse_switch": [1.9, 2.09, 2.28]}
    found = values([made("a", lines=process(TIMES)), made("b", lines=process(faster, offset=3.0))])
    ratio = found["adafuse_switch", "ratio"]
    assert ratio.value == pytest.approx(math.sqrt(2.0 * 1.9)) and ratio.n == 2
    assert ratio.low < ratio.value < ratio.high and ratio.reason == "t over 2 processes of one host"
    assert ratio.records == "a b"
    # the median over processes of each one's median
    assert found["adafuse_switch", "ms_per_token"].value == pytest.approx(np.median([2.2, 3 * 2.09]))
    assert ("base", "ratio") not in found


def test_processes_of_several_hosts_are_an_interval_over_hosts(made):
    cards = [{"machine": GPU | {"gpu_id": key * 12}} for key in "112"]
    faster = {**TIMES, "adafuse_switch": [1.9, 2.09, 2.28]}
    own = zip("abc", cards, (TIMES, TIMES, faster), strict=True)
    found = values([made(key, header=card, lines=process(times)) for key, card, times in own])
    ratio = found["adafuse_switch", "ratio"]
    assert (ratio.n, ratio.hosts, ratio.reason) == (3, 2, "t over 2 hosts")
    assert ratio.value == pytest.approx(math.sqrt(2.0 * 1.9))
    assert ratio.predict_low < ratio.low < ratio.within_low <= ratio.value


def test_blocks_that_do_not_count_change_nothing(made):
    noise = [
        block("adafuse_switch", 3, 99.0, excluded="preempted: 3 times"),
        block("adafuse_switch", 4, 99.0),
    ]
    flag = {"kind": "flag", "arm": "adafuse_switch", "round": 4, "reason": "preempted: once"}
    plain, noisy = (
        values([made("a", lines=process(TIMES))]),
        values([made("a", lines=[*process(TIMES), *noise, flag])]),
    )
    for quantity in ("ratio", "ms_per_token"):
        # as text, because nan is no nan
        assert str(noisy["adafuse_switch", quantity]) == str(plain["adafuse_switch", quantity])
    counts = [noisy["eager", name].value for name in ("processes", "rounds", "blocks", "excluded", "flagged")]
    assert counts == [1, 3, 11, 1, 1]
    assert noisy["eager", "left_out"].reason == "2 preempted"


def test_the_backbone_beside_itself_says_which_ratios_are_resolved(made):
    times = {"base": [1.0] * 3, "base_again": [1.1] * 3, "adafuse_switch": [1.05] * 3, "mola_loop": [1.5] * 3}
    arms = list(times)
    found = values([made(key, arms=arms, lines=process(times)) for key in "ab"])
    ratios = [found[arm, "ratio"].value for arm in arms[2:]]
    assert ratios[0] < 1 + found["eager", "resolution"].value < ratios[1]
    assert found["eager", "again_ratio"].value == pytest.approx(1.1)
    assert found["eager", "resolution"].value == pytest.approx(0.1)


def test_an_arm_is_held_against_the_backbone_of_its_own_runtime(made):
    times = {
        "base": [4.0] * 2,
        "base_graph": [1.0] * 2,
        "base_gemv_graph": [0.8] * 2,
        "adafuse_fused_graph": [1.2] * 2,
    }
    found = values([made(key, arms=list(times), lines=process(times)) for key in "ab"])
    assert found["adafuse_fused_graph", "ratio"].value == pytest.approx(1.2)
    assert found["adafuse_fused_graph", "gemv_ratio"].value == pytest.approx(1.5)
    assert ("adafuse_fused_graph", "over.base") not in found


def test_arms_that_differ_in_one_thing_and_adapters_over_the_switch(made):
    times = {
        "base": [1.0] * 2,
        "mola_loop": [6.0] * 2,
        "adafuse_loop": [3.0] * 2,
        "adafuse_switch": [2.0] * 2,
    }
    times |= {"adafuse_layerwise_gather_graph": [1.1] * 2, "adafuse_gather_graph": [1.0] * 2}
    found = values([made(key, arms=list(times), lines=process(times)) for key in "ab"])
    compared = {key: found[key].value for key in found if key[1].startswith(("over.", "gate_ratio"))}
    assert compared == pytest.approx(
        {
            ("mola_loop", "over.adafuse_loop"): 2.0,
            ("mola_loop", "over.adafuse_switch"): 3.0,
            ("adafuse_loop", "over.adafuse_switch"): 1.5,
            ("adafuse_layerwise_gather_graph", "gate_ratio"): 1.1,
        }
    )


ERROR = {"kind": "error", "where": "arm adafuse_switch", "message": "RuntimeError: no room", "traceback": ""}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "not in the record"),
        (
            [check("adafuse_switch", value=0.5, bound=0.1, passed=False)],
            "check failed: logits 0.5, bound 0.1",
        ),
        (
            [check("adafuse_switch", value=None, bound=0.1, passed=False)],
            "check failed: logits none, bound 0.1",
        ),
        ([ERROR], "error: RuntimeError: no room"),
        ([block("adafuse_switch", 0, 1.0, excluded="preempted")], "every block excluded: preempted"),
    ],
)
def test_an_arm_without_a_time_says_why(made, lines, reason):
    times = {arm: TIMES[arm] for arm in ("base", "base_again")}
    found = values([made("a", lines=[*process(times), *lines])])
    assert math.isnan(found["adafuse_switch", "ms_per_token"].value)
    assert found["adafuse_switch", "ms_per_token"].reason == reason
    assert found["adafuse_switch", "ratio"].reason == f"no time of adafuse_switch ({reason})"


def test_an_error_is_of_the_arm_that_it_names_as_a_whole_word(made):
    graph = ERROR | {"where": "arm adafuse_switch_graph"}
    times = {arm: TIMES[arm] for arm in ("base", "base_again")}
    lines = [
        *process(times),
        graph,
        check("adafuse_switch"),
        block("adafuse_switch", 0, 1.0, excluded="preempted"),
    ]
    assert values([made("a", lines=lines)])["adafuse_switch", "ms_per_token"].reason.startswith("every block")


def test_an_unfinished_record_gives_no_number_but_a_reason(made):
    found = values([made("a", lines=process(TIMES), status="unfinished")])
    assert found["base", "ms_per_token"].reason == "unfinished record: run the same command again"
    assert not any(value.value > 0 for key, value in found.items())


def test_of_all_processes_the_worst_check_counts_and_the_nearest_to_its_bound_decides(made):
    one = [check("base", value=0.2), check("base", "greedy", 0.0, 0.0), check("base", "whole", 0.5, 2.0)]
    two = [
        check("base", value=0.3),
        check("base", "greedy", 0.0, 0.0),
        check("base", "whole", None, 2.0, passed=False),
    ]
    found = values([made("a", lines=one)])
    assert (found["base", "check.logits"].value, found["base", "check.whole"].high) == (0.2, 2.0)
    assert (found["base", "check"].value, found["base", "check"].reason) == (0.5, "whole")
    both = values([made("a", lines=one), made("b", lines=two)])
    assert both["base", "check.logits"].value == 0.3 and both["base", "check.logits"].reason == "d"
    assert math.isnan(both["base", "check.whole"].value) and both["base", "check.whole"].high == 2.0
    assert both["base", "check"].reason == "whole" and both["base", "check_bound"].value == 2.0


def test_cost_floor_and_share_of_the_measured_bandwidth(made):
    def lines(floor_ms, read_gbps):
        calibration = {"kind": "calibration", "read_gbps": read_gbps, "copy_gbps": 1.0, "tiny_node_us": None}
        return [calibration, *process(TIMES), cost("adafuse_switch", floor_ms)]

    found = values([made("a", lines=lines(0.4, 3000.0)), made("b", lines=lines(0.6, 5000.0))])
    assert found["adafuse_switch", "floor_ms"].value == pytest.approx(0.5)
    assert found["adafuse_switch", "over_floor"].value == pytest.approx(2.2 / 0.5)
    assert found["adafuse_switch", "bandwidth_share"].value == pytest.approx(2e9 / 2.2e-3 / 4000e9)
    assert found["adafuse_switch", "params"].value == 100
    assert found["machine", "read_gbps"].value == 4000.0 and found["machine", "read_gbps"].n == 2
    assert ("machine", "tiny_node_us") not in found


def memory(made, key, arm, peak_gib=2.0, version=1, **changes):
    sizes = {"weights_gib": 1.0, "peak_gib": peak_gib, "process_gib": 3.0, "note": ""}
    header = {"experiment": "table5", "arm_versions": {arm: version}}
    return made(
        key, "memory", [{"kind": "memory", "arm": arm, **sizes}], arms=[arm], header=header, **changes
    )


def test_memory_is_joined_by_workload_and_by_what_the_arm_is(made):
    timed = made("a", lines=process(TIMES))
    other = {name: {"name": name, "routing": "token", "rank": 4} for name in ("base", "adafuse")}
    records = [
        timed,
        memory(made, "b", "base", 1.5),
        memory(made, "c", "adafuse_switch", 2.0),
        memory(made, "d", "adafuse_switch", 9.0, batch=8),
        memory(made, "e", "adafuse_switch", 9.0, methods=other),
        memory(made, "f", "adafuse_switch", 9.0, latency={"block_tokens": 200}),
    ]
    found = values(records)
    assert (found["adafuse_switch", "peak_gib"].value, found["adafuse_switch", "peak_gib"].records) == (
        2.0,
        "c",
    )
    assert found["adafuse_switch", "base_peak_gib"].value == 1.5
    assert values(records, "table5")["base", "peak_gib"].value == 1.5


MENDED = {"arm_versions": {"base": 1, "adafuse_switch": 2}}


def test_versions_of_an_arm_are_never_pooled_and_the_newest_is_shown(made):
    """Of an older record the arms that nobody mended stay replicates of today's."""
    old = {"base": [1.0] * 3, "base_again": [1.0] * 3, "adafuse_switch": [9.0] * 3}
    new = {"base": [3.0] * 3, "base_again": [3.0] * 3, "adafuse_switch": [6.0] * 3}
    extra = [check("adafuse_switch", value=0.9), cost("adafuse_switch", 7.0)]
    records = [made("a", lines=[*process(old), *extra, check("base", value=0.4)])]
    assert values(records)["adafuse_switch", "ms_per_token"].value == 9.0
    unfinished = made("c", lines=process(new), header=MENDED, status="unfinished")
    found = values([*records, unfinished])
    assert (found["adafuse_switch", "ms_per_token"].value, found["adafuse_switch", "floor_ms"].value) == (
        9,
        7,
    )
    records.append(made("b", lines=[*process(new), check("adafuse_switch", value=0.2)], header=MENDED))
    found = values([*records, unfinished])
    ms, ratio = found["adafuse_switch", "ms_per_token"], found["adafuse_switch", "ratio"]
    assert (ms.value, ms.n, ms.records) == (6.0, 1, "b")
    assert ratio.value == pytest.approx(2.0) and (ratio.n, ratio.records) == (1, "b")
    assert found["adafuse_switch", "check.logits"].value == 0.2
    assert ("adafuse_switch", "floor_ms") not in found
    base = found["base", "ms_per_token"]
    assert (base.value, base.n, base.records) == (2.0, 2, "a b") and found["eager", "processes"].value == 2
    assert found["base", "check.logits"].value == 0.4
    (cell,) = measured([*records, unfinished]).cells
    said = "left out for a newer version of the arm's code: adafuse_switch of 1 record"
    assert cell.caption.endswith(said) and "newer" not in measured(records[:1]).cells[0].caption


def test_a_mended_arm_that_fails_is_not_answered_with_its_older_time(made):
    failed = [*process({"base": [1.0]}), check("adafuse_switch", value=0.5, bound=0.1, passed=False)]
    found = values([made("a", lines=process(TIMES)), made("b", lines=failed, header=MENDED)])
    ms = found["adafuse_switch", "ms_per_token"]
    assert math.isnan(ms.value) and ms.reason == "check failed: logits 0.5, bound 0.1"


def test_memory_of_another_version_of_an_arm_is_none_of_its(made):
    timed = made("a", lines=process(TIMES), header=MENDED)
    old = memory(made, "b", "adafuse_switch", 9.0)
    assert values([timed, old], "table1")["adafuse_switch", "peak_gib"].reason.startswith("not measured")
    new = memory(made, "c", "adafuse_switch", 2.0, version=2)
    for experiment in ("table1", "table5"):
        found = values([timed, old, new], experiment)["adafuse_switch", "peak_gib"]
        assert (found.value, found.records) == (2.0, "c")


def test_memory_that_is_missing_says_why(made):
    counted = {"kind": "memory", "arm": "base", "weights_gib": 0.7, "peak_gib": None, "note": ""}
    found = values([made("a", lines=[*process(TIMES), counted]), memory(made, "c", "adafuse_switch", None)])
    assert found["adafuse_switch", "peak_gib"].reason == "a peak needs a GPU"
    assert found["base", "peak_gib"].reason == "not measured: task=memory arms.run=[base]"
    assert found["base", "weights_gib"].value == 0.7


def test_the_state_of_the_device_during_the_blocks(made):
    slow = [block("adafuse_switch", n, 2.0, sm_mhz=1500.0, foreign_processes=2) for n in range(2)]
    lines = [*process({"base": [1.0] * 3}), *slow]
    found = values([made("a", lines=lines)])
    names = ("sm_mhz", "sm_mhz_lowest_arm", "power_w", "foreign_processes")
    assert [found["eager", name].value for name in names] == [1980.0, 1500.0, 400.0, 2]


# -- several cells, and what is measured apart from arms in competition


def blocks(arm, ms):
    return [block(arm, number, ms) for number in range(2)]


def measured(records, rows=None):
    table = None if rows is None else pd.DataFrame(rows, columns=COLUMNS)
    return latency.measure(frames(records, table))


def test_a_shared_record_gives_its_numbers_under_each_experiment(made):
    lines = [*blocks("base", 1.0), *blocks("adafuse_switch", 2.0)]
    rows = [[name, "gpu", "latency", "replicate=0", "a"] for name in ("table1", "table6")]
    found = measured([made("a", lines=lines)], rows)
    ratios = found.values.query("quantity == 'ratio' and row == 'adafuse_switch'")
    assert list(ratios["experiment"]) == ["table1", "table6"] and ratios["value"].nunique() == 1
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


def test_steps_of_training_are_tokens_a_second_over_pefts_paired_by_round(made):
    numbers = {
        "parameters": 9,
        "tokens_per_s": 5.0,
        "flops_per_token": 7,
        "matrix_share": 0.4,
        "peak_gib": None,
    }
    records = []
    cases = (
        ("a", "mixlora", 2.0, 1),
        ("b", "adafuse", 1.0, 2),
        ("c", "adafuse", 0.5, 2),
        ("d", "adafuse", 9, 1),
    )
    for key, method, ms, version in cases:
        times = {"peft_lora": [1.0, 1.1, 1.2], method: [ms * 1.0, ms * 1.1, ms * 1.2]}
        lines = [{"kind": "fit_speed", "arm": arm, **numbers, "ratio": 1.0} for arm in times]
        lines.append(check(method, value=0.4 if key == "d" else 0.2))
        own = {"header": {"arm_versions": {method: version}}, "method": {"name": method}}
        records.append(made(key, "fit_speed", process(times) + lines, **own))
    found = values(records)
    assert found["mixlora", "ratio"].value == pytest.approx(0.5) and found["mixlora", "ratio"].n == 1
    assert found["adafuse", "ratio"].value == pytest.approx(2**0.5) and found["adafuse", "ratio"].n == 2
    assert "d" not in found["adafuse", "ratio"].records, "an older version of the code is not pooled"
    assert (found["adafuse", "check"].value, found["adafuse", "check"].records) == (0.2, "b c")
    assert found["peft_lora", "tokens_per_s"].records == "a b c" and ("peft_lora", "ratio") not in found
    assert measured(records).cells[0].caption.endswith("adafuse of 1 record, peft_lora of 1 record")
    assert found["adafuse", "matrix_share"].value == 0.4 and ("adafuse", "peak_gib") not in found


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
    assert found["base", "token_ms"].value == pytest.approx(1.8) and found["base", "token_ms"].records == "c"
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
