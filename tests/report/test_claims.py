"""Claims and goals over a made-up board: the right number, the right rule, and never an absolute millisecond."""

from dataclasses import replace

import pytest

from adafuse.report.claims import all_claims, all_goals
from adafuse.report.formats import verdict_text
from adafuse.report.rules import IN_PART, NOT_DECIDED, NOT_REPLICATED, NOT_TESTABLE, REPLICATED
from synthetic.board import FACTORS, LLAMA, PAPER, SPECS, Made, around, minus, paper_cell

GATHER = "AdaFuse (gather), rank 16, batch 1"


def claims(made):
    return {claim.id: claim for claim in all_claims(made.cells, SPECS["claims"], PAPER) if claim.cell}


def goals(made):
    return {goal.text: goal for goal in all_goals(made.cells, SPECS["claims"])}


@pytest.fixture
def made():
    return Made()


def test_where_the_paper_is_right_every_claim_of_cost_is_replicated(made):
    paper_cell(made)
    found = claims(made)
    judged = {name: claim.verdict.verdict for name, claim in found.items() if name != "absolute_ms"}
    # the abstract's 2.4 is not what the paper's own tables give
    assert judged.pop("gain.fastest") == IN_PART
    assert len(judged) == 19 and set(judged.values()) == {REPLICATED}, judged
    assert (
        found["absolute_ms"].verdict.verdict == NOT_TESTABLE
        and "never compared" in found["absolute_ms"].verdict.why
    )
    assert found["absolute_ms"].ours == "backbone 10.0 ms" and "MOLA 25.3" in found["absolute_ms"].printed
    assert all(claim.records for claim in found.values())
    assert found["gain.pesc_loop"].text == "PESC over AdaFuse (switch): a token costs 2.74 times as much"
    assert (
        found["gain.pesc_loop"].printed == "2.74 (+174 %)"
        and found["gain.fastest"].printed == "2.40 (+140 %)"
    )
    assert found["ablation.order"].ours == "4 of 4 steps"


def test_every_printed_cost_has_a_claim(made):
    """Each number of the latency tables but the backbone's own, by the table it stands in."""
    paper_cell(made)
    found = claims(made).values()
    kinds = {"ms_per_token": "time", "params_b": "count", "macs_g": "count", "peak_gib": "memory"}
    for number in (1, 5, 6):
        for row in PAPER[f"table{number}"]["rows"][1:]:
            for column in PAPER[f"table{number}"]["columns"]:
                base = PAPER[f"table{number}"]["rows"][0][column]
                own = [
                    c
                    for c in found
                    if c.row == row["arm"] and c.kind == kinds[column] and str(number) in c.where
                ]
                assert any(c.paper == pytest.approx(row[column] / base) for c in own), (
                    number,
                    row["arm"],
                    column,
                )


def test_a_slower_adafuse_is_reported_as_such(made):
    paper_cell(made, {"adafuse_switch": 6.0})
    found = claims(made)
    assert found["time.adafuse_switch"].verdict.verdict == NOT_REPLICATED
    assert found["gain.fastest"].verdict.verdict == NOT_REPLICATED
    assert "AdaFuse (simple merge) > AdaFuse (switch)" in found["ablation.order"].verdict.why


def test_what_the_rule_before_said_stands_beside_where_it_is_something_else(made):
    paper_cell(made, {"adafuse_switch": 1.02})
    found = claims(made)["time.adafuse_switch"].verdict
    assert (found.verdict, found.before) == (NOT_REPLICATED, REPLICATED)
    assert verdict_text(found) == "not replicated (before 2026-12-01: replicated)"
    assert not claims(made)["time.pesc_loop"].verdict.before
    paper_cell(made, {"adafuse_switch": 1.02}, machine="CPU", model="tiny")
    assert not claims(made)["time.adafuse_switch"].verdict.before, "a CPU judges nothing, by whatever rule"


def test_the_fastest_other_is_chosen_by_our_own_times(made):
    paper_cell(made, {"mola_loop": 2.0})
    found = claims(made)["gain.fastest"]
    assert "(here MoLA)" in found.text and found.row == "mola_loop"
    assert found.ours.value == pytest.approx(2.0 / 1.29) and found.verdict.verdict == IN_PART
    assert claims(made)["gain.pesc_loop"].ours.value == pytest.approx(3.5 / 1.29), (
        "the table's own gain is over PESC"
    )


def test_failed_arms_are_not_judged(made):
    paper_cell(made, without=("adafuse_switch", "pesc_loop"))
    found = claims(made)
    assert found["time.pesc_loop"].verdict.why == "no time"
    assert found["gain.fastest"].verdict.verdict == NOT_TESTABLE
    assert found["gain.fastest"].verdict.why.endswith("not among them, for want of a time: PESC")
    order = found["ablation.order"].verdict
    assert (
        order.verdict == IN_PART
        and "not timed: AdaFuse (simple merge) > AdaFuse (switch) (check failed" in order.why
    )


def test_noise_decides_nothing(made):
    paper_cell(made, width=1.2)
    assert claims(made)["time.pesc_loop"].verdict.verdict == NOT_DECIDED
    assert claims(made)["gain.pesc_loop"].verdict.verdict == NOT_DECIDED
    known = Made()
    place = paper_cell(known)
    known.numbers(place, "eager", {"resolution": 3.0})
    assert "A/A" in claims(known)["gain.pesc_loop"].verdict.why


def test_a_cpu_judges_counts_alone(made):
    paper_cell(made, machine="CPU", model="tiny")
    found = claims(made)
    assert found["time.pesc_loop"].verdict.verdict == NOT_TESTABLE
    assert (
        "on CPU, tiny backbone: needs a GPU; here the rule gives “replicated”"
        in found["time.pesc_loop"].verdict.why
    )
    assert found["params.pesc_loop"].verdict.verdict == REPLICATED
    assert (
        found["params.pesc_loop"].verdict.why == "on CPU, tiny backbone: the added share is within the band"
    )


def test_a_gpu_stands_first_and_a_shared_cell_once(made):
    paper_cell(made, machine="CPU")
    place = paper_cell(made)
    also = {"experiment": "table6"}
    made.names.append(replace(made.names[-1], **also))
    made.values += [replace(own, **also) for own in made.values if own.cell == place.cell]
    found = [
        claim.cell.name
        for claim in all_claims(made.cells, SPECS["claims"], PAPER)
        if claim.id == "time.mola_loop"
    ]
    assert [name.machine for name in found] == ["NVIDIA H200", "CPU"]
    assert found[0].experiment == "table1"


def test_captured_arms_leave_the_verdicts_as_they_are(made):
    place = paper_cell(made)
    # as text, because nan is no nan
    before = [str(replace(claim, cell=None)) for claim in claims(made).values()]
    made.row(place, "adafuse_gather_graph", {"ms_per_token": 1.0, "ratio": around(0.1)}, runtime="graph")
    made.cell("graph", "captured")
    assert [str(replace(claim, cell=None)) for claim in claims(made).values()] == before


def test_memory_of_a_workload_that_nobody_timed_is_judged(made):
    place = made.cell("table5", "alone")
    for row, peak in (("base", 10.0), ("mola_loop", 20.4), ("adafuse_switch", 13.0)):
        made.row(place, row, {"peak_gib": peak})
    found = claims(made)
    assert found["memory.mola_loop"].verdict.verdict == REPLICATED
    assert found["memory.adafuse_switch"].verdict.verdict == NOT_REPLICATED
    assert found["memory.adafuse_switch"].verdict.why.startswith("same direction, 4.3 times")
    paper_cell(made)
    assert {claim.cell.name.experiment for claim in claims(made).values()} == {"table1"}


@pytest.mark.parametrize(
    ("numbers", "verdict", "said"),
    [
        (minus(0.0, 1.0, "moral"), REPLICATED, "lies within"),
        (minus(-6.0, 1.0, "moral", p=0.9), NOT_REPLICATED, "worse"),
        (minus(0.0, 1.0, "moral", n=1), NOT_TESTABLE, "only 1 of 5 seeds"),
        ({"minus.moral": "not run for moral"}, NOT_TESTABLE, "not run for moral"),
    ],
)
def test_accuracy(made, numbers, verdict, said):
    place = made.cell("table2", "small", task="evaluate", model="small")
    made.row(place, "adafuse", numbers, method="adafuse")
    found = claims(made)["accuracy2.moral"]
    assert found.verdict.verdict == verdict and said in found.verdict.why
    assert found.text == "AdaFuse no worse than MoRAL, average" and found.printed == "-0.09 points"
    assert "accuracy2.mola" not in claims(made), "the paper has no such row in Table 2"


def test_a_layer_is_judged_row_by_row(made):
    for experiment in ("figure1", "figure2"):
        place = made.cell(experiment, experiment, task="layer")
        made.row(place, "decode 1 rank16", {"ratio": around(1.7)}, "decode, 1 token, rank 16")
        made.numbers(place, "machine", {"read_gbps": 4000.0})
    found = [
        claim for claim in all_claims(made.cells, SPECS["claims"], PAPER) if claim.where.startswith("Figure")
    ]
    assert [claim.verdict.verdict for claim in found] == [REPLICATED, REPLICATED]
    assert found[1].printed == "> 1" and found[1].text.endswith("decode, 1 token, rank 16")


def test_what_was_not_run_says_so(made):
    paper_cell(made)
    found = [claim for claim in all_claims(made.cells, SPECS["claims"], PAPER) if claim.cell is None]
    tables = ["Table 2", "Table 3", "Table 4", "Figure 1", "Figure 2"]
    # of rivals in their best forms: eager, graph, lean
    assert [claim.where for claim in found] == ["Abstract"] * 3 + tables
    assert found[4].verdict.why == "not run in this profile: experiment=table3"
    made.cell("table1", "another", task="latency")
    assert len(claims(made)) == 21, "a cell without the paper's arms has no claim"


def graph_cell(
    made, experiment="graph", ratio=1.04, n=3, machine="NVIDIA H200", row="adafuse_gather_graph", **facts
):
    place = made.cell(experiment, f"{experiment} {len(made.runs)}", machine, **facts)
    runtime = "compiled" if row.endswith("compiled") else "graph"
    made.row(
        place,
        row,
        {"ratio": around(ratio, 0.001, n), "ms_per_token": 6.0, "bandwidth_share": 0.7},
        runtime=runtime,
    )
    return place


def test_goals_read_the_cell_with_most_processes(made):
    graph_cell(made, ratio=1.2)
    graph_cell(made, "batch_scan", ratio=1.04, n=5)
    found = goals(made)
    assert (
        len(found) == len(SPECS["claims"]["goals"])
        and found[GATHER].verdict.word == "met"
        and found[GATHER].ours.n == 5
    )
    assert found["AdaFuse (gather), rank 16, batch 8"].verdict.word == "not measured"


def test_the_better_runtime_counts_and_both_are_shown(made):
    graph_cell(made, ratio=1.08)
    graph_cell(made, "compiled", ratio=1.20, row="adafuse_gather_compiled")
    found = goals(made)[GATHER]
    assert found.ours.value == 1.08 and found.verdict.verdict == "missed by 0.03"
    assert "adafuse_gather_compiled: 1.200 [" in found.verdict.why
    graph_cell(made, "compiled", ratio=0.99, row="adafuse_gather_compiled", n=5)
    assert goals(made)[GATHER].verdict.word == "met"


@pytest.mark.parametrize(
    "facts",
    [
        {"shape": LLAMA["shape"] | {"num_hidden_layers": 2}},
        {"dtype": "float16"},
        {"path": "/some/folder"},
        {"targets": "q, v"},
        {"top_k": 1},
        {"context": 64},
        {"batch": 2},
    ],
    ids=lambda facts: next(iter(facts)),
)
def test_another_shape_answers_no_goal(made, facts):
    graph_cell(made, **facts)
    assert {goal.verdict.word for goal in goals(made).values()} == {"not measured"}


def test_the_backbone_is_held_against_the_bandwidth(made):
    graph_cell(made, row="base_graph")
    graph_cell(made, row="base_gemv_graph")
    found = goals(made)["plain backbone, batch 1: share of read bandwidth"]
    assert found.verdict.verdict == "missed by 10 points" and found.ours == "70.0 %"
    assert found.verdict.why.endswith("base_gemv_graph: 70.0 %; base_gemv_compiled: not run"), (
        "shown, and not counted"
    )


def test_the_worst_line_of_a_kernel_counts_and_a_failed_one_misses(made):
    place = made.cell("kernels", "kernels", task="kernel")
    made.row(place, "switch all rank16", {"ms": 6.9, "share": 0.9}, "switch")
    made.row(place, "switch qv rank16", {"ms": 1.0, "share": 0.8}, "switch")
    made.row(place, "gather all rank16", {"ms": 1.0, "share": 0.1}, "gather")
    share, alone = "switch kernel, every shape: share of copy bandwidth", "switch kernel alone, rank 16"
    found = goals(made)
    assert found[alone].verdict.word == "met" and found[alone].ours == "6.90 ms"
    assert found[share].verdict.verdict == "missed by 5 points"
    assert found[share].verdict.why == "llama2_7b, switch qv rank16, the worst of 2 lines"
    made.row(place, "switch qkvo rank16", {"ms": "check failed", "share": "check failed"}, "switch")
    failed = goals(made)
    assert (
        failed[share].verdict.verdict == "missed: a line has no time"
        and "check failed" in failed[share].verdict.why
    )
    assert failed[alone].verdict.word == "met"


def test_the_fastest_other_adapter_counts_as_a_goal(made):
    paper_cell(made, {"pesc_loop": 2.0})
    found = goals(made)["eager: fastest other adapter over AdaFuse (switch)"]
    assert (
        found.ours.value == pytest.approx(2.0 / FACTORS["adafuse_switch"]) and found.verdict.word == "missed"
    )
    assert "mola_loop: 8.14" in found.verdict.why and "mixlora_loop: not run" in found.verdict.why


def test_the_reason_of_an_arm_without_a_time_and_one_process_are_said(made):
    place = graph_cell(made, n=1)
    assert goals(made)[GATHER].verdict.why.startswith(
        "adafuse_gather_graph: 1.040 [1.039, 1.041], t over 1 processes"
    )
    made.numbers(place, "adafuse_gather_graph", {"ratio": "no time", "ms_per_token": "check failed: logits"})
    assert "adafuse_gather_graph: check failed: logits" in goals(made)[GATHER].verdict.why


def test_a_cpu_has_no_goals_and_two_gpus_are_two_machines(made):
    graph_cell(made, machine="CPU")
    assert not goals(made)
    graph_cell(made, machine="NVIDIA H100", ratio=1.2)
    graph_cell(made)
    found = {(goal.where, goal.id): goal.verdict.word for goal in all_goals(made.cells, SPECS["claims"])}
    assert found["NVIDIA H100 · Xeon", "gather.r16.b1"] == "missed"
    assert found["NVIDIA H200 · Xeon", "gather.r16.b1"] == "met"
    assert ("NVIDIA H100 · Xeon", "switch.ms") not in found, "milliseconds are of one card"
