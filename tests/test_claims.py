"""Verdicts follow the written rules, at their edges, and never from an absolute millisecond."""

import math
import types

import pytest

import synthetic
from adafuse.records import load
from adafuse.report import find, verdicts
from adafuse.report.claims import sheet
from adafuse.report.paper import load_paper
from adafuse.report.sheet import markdown
from adafuse.report.verdicts import (
    IN_PART,
    NOT_DECIDED,
    NOT_REPLICATED,
    NOT_TESTABLE,
    REPLICATED,
    judge_ratio,
)
from adafuse.stats import Interval
from synthetic_memory import GPU, write_both


def interval(low: float, high: float, processes: int = 3) -> Interval:
    method = f"t over {processes} processes" if processes > 1 else "one process: rounds only"
    return Interval(math.sqrt(low * high), low, high, processes, 60, method)


@pytest.mark.parametrize(
    ("sense", "paper", "low", "high", "verdict"),
    [
        ("about", 3.5, 3.3, 3.4, REPLICATED),
        ("about", 3.5, 2.0, 2.5, IN_PART),
        ("about", 3.5, 8.0, 9.0, IN_PART),
        ("about", 3.5, 0.8, 0.9, NOT_REPLICATED),
        ("about", 3.5, 0.9, 4.0, NOT_DECIDED),
        # noise does not count for the paper, nor the sign alone
        ("about", 3.5, 2.0, 15.0, NOT_DECIDED),
        # nor against it, but where both ends say the same it does not matter
        ("about", 1.67, 25.0, 45.0, NOT_REPLICATED),
        ("about", 3.5, 4.2, 6.9, IN_PART),
        ("about", 3.5, 3.8, 4.2, IN_PART),
        ("about", 3.5, 15.0, 16.0, NOT_REPLICATED),
        ("about", 3.5, 1.1, 1.2, NOT_REPLICATED),
        ("at_most", 1.29, 0.99, 1.10, REPLICATED),
        ("at_most", 1.29, 1.20, 1.41, REPLICATED),
        ("at_most", 1.29, 1.30, 1.50, IN_PART),
        ("at_most", 1.29, 1.43, 1.50, NOT_REPLICATED),
        ("at_least", 2.4, 2.2, 2.3, REPLICATED),
        ("at_least", 2.4, 1.5, 2.3, IN_PART),
        ("at_least", 2.4, 0.8, 0.9, NOT_REPLICATED),
        ("at_least", 2.4, 0.9, 3.0, NOT_DECIDED),
    ],
)
def test_ratios(sense, paper, low, high, verdict):
    assert judge_ratio(paper, interval(low, high), sense)[0] == verdict


def test_a_ratio_in_the_noise_is_not_replicated():
    verdict, why = judge_ratio(3.5, interval(1.005, 1.01), "about", resolved=False)
    assert verdict == NOT_REPLICATED and "A/A" in why
    assert judge_ratio(1.29, interval(0.99, 1.01), "at_most", resolved=False)[0] == REPLICATED


def test_what_is_missing_or_thin_says_so():
    assert judge_ratio(3.5, None, "about", reason="check failed: logits") == (
        NOT_TESTABLE,
        "check failed: logits",
    )
    assert "one process" in judge_ratio(3.5, interval(3.4, 3.6, 1), "about")[1]


def test_order():
    step = ("A", "B", True, None)
    assert verdicts.judge_order([step, step])[0] == REPLICATED
    assert verdicts.judge_order([step, ("B", "C", False, None)]) == (IN_PART, "does not hold: B > C")
    assert verdicts.judge_order([("A", "B", False, None)])[0] == NOT_REPLICATED
    assert verdicts.judge_order([("A", "B", None, "not run")])[0] == NOT_TESTABLE


def test_costs_need_a_real_backbone():
    assert verdicts.judge_cost(1.05, interval(1.05, 1.05), 1e6, None)[0] == NOT_TESTABLE
    assert verdicts.judge_cost(1.05, interval(1.05, 1.05), 7e9, None)[0] == REPLICATED
    assert verdicts.judge_cost(1.05, interval(1.10, 1.10), 7e9, None)[0] == IN_PART
    assert verdicts.judge_cost(1.05, interval(1.25, 1.25), 7e9, None)[0] == NOT_REPLICATED


def test_a_value_without_an_interval_is_called_a_value():
    single = Interval(1.05, 1.05, 1.05, 1, 0, "one process each")
    assert judge_ratio(1.07, single, "at_most", close=1.02)[1].startswith("our value lies below 1.09")
    assert judge_ratio(1.05, single, "about")[1].startswith("our value lies within")
    assert "our interval ends below" in judge_ratio(1.29, interval(1.1, 1.2), "at_most")[1]


def by_text(folder) -> dict[str, object]:
    return {f"{claim.where}: {claim.text}": claim for claim in find(load([folder])).claims}


def find_claim(claims, *words):
    return next(claim for text, claim in claims.items() if all(word in text for word in words))


def gives(claim, verdict):
    """The synthetic cells are timed on a CPU, which judges nothing; the reason says what the rule would."""
    return claim.verdict == NOT_TESTABLE and f"needs a GPU; here the rule gives “{verdict}”" in claim.why


def test_a_time_on_a_gpu_is_judged():
    gpu = types.SimpleNamespace(is_cpu=False, config={})
    assert verdicts.timed_on(gpu, REPLICATED, "why") == (REPLICATED, "why")


def test_a_whole_profile(tmp_path):
    claims = by_text(synthetic.write_all(tmp_path, seeds=verdicts.MIN_SEEDS))
    assert gives(find_claim(claims, "Tables 1, 5", "MoRAL"), REPLICATED)
    speedup = find_claim(claims, "Abstract", "PESC")
    assert speedup.ours.ratio == pytest.approx(5.0 / 2.7, rel=0.02) and gives(speedup, IN_PART)
    assert gives(find_claim(claims, "Table 6", "each row slower"), REPLICATED)
    absolute = find_claim(claims, "absolute ms")
    assert absolute.verdict == NOT_TESTABLE and "never compared" in absolute.why
    assert find_claim(claims, "peak memory", "AdaFuse").verdict == NOT_TESTABLE
    assert find_claim(claims, "Table 2", "PESC").verdict == REPLICATED
    assert gives(find_claim(claims, "Figure 2", "decode", "rank 32"), REPLICATED)
    assert find_claim(claims, "Figure 1").ours.ratio == pytest.approx(0.084 / 0.0104, rel=0.05)
    judged = [claim for claim in claims.values() if claim.verdict != NOT_TESTABLE]
    assert all("on CPU, tiny backbone" in claim.why for claim in judged)
    assert all(claim.files for claim in judged)


def test_one_seed_is_never_replicated_but_shows_the_difference(tmp_path):
    for method in ("lora", "moral", "adafuse"):
        synthetic.write_accuracy(tmp_path, method)
    claim = find_claim(by_text(tmp_path), "Table 2", "MoRAL")
    assert claim.verdict == NOT_TESTABLE and claim.ours.n_seeds == 1
    assert "1 of 5 seeds" in claim.why and "items only" in claim.why
    assert find_claim(by_text(tmp_path), "Table 2", "PESC").why.endswith("not run for pesc")


def test_failed_arms_are_not_judged(tmp_path):
    synthetic.write_latency(tmp_path, failed=("adafuse_switch",), broken=("pesc_loop",))
    claims = by_text(tmp_path)
    switch = find_claim(claims, "Tables 5, 6")
    assert switch.verdict == NOT_TESTABLE and "check failed" in switch.why
    assert find_claim(claims, "Abstract").verdict == NOT_TESTABLE
    order = find_claim(claims, "Table 6", "each row slower")
    assert gives(order, IN_PART) and "not timed" in order.why and "check failed" in order.why


def test_a_slower_adafuse_is_reported_as_such(tmp_path):
    for replicate in range(3):
        synthetic.write_latency(tmp_path, replicate, factors={"adafuse_switch": 3.0})
    claims = by_text(tmp_path)
    assert gives(find_claim(claims, "Tables 5, 6"), NOT_REPLICATED)
    assert gives(find_claim(claims, "Abstract"), NOT_REPLICATED)
    assert "AdaFuse (simple merge) > AdaFuse (switch)" in find_claim(claims, "each row slower").why


def test_captured_arms_leave_the_verdicts_as_they_are(tmp_path):
    """The paper's rows are eager; a runtime of our own must not move their ratios."""
    for replicate in range(2):
        synthetic.write_latency(tmp_path, replicate)
    before = find(load([tmp_path])).claims
    for replicate in range(2):
        synthetic.write_latency(tmp_path, replicate, "graph")
        synthetic.write_latency(tmp_path, replicate, "mixed")
    assert find(load([tmp_path])).claims == before


def test_every_printed_cost_has_a_claim(tmp_path):
    """Each number of the latency tables but the backbone's own, by the table it stands in."""
    write_both(tmp_path)
    claims, paper = find(load([tmp_path])).claims, load_paper()
    words = {
        "ms_per_token": "a token costs",
        "params_b": "parameters",
        "macs_g": "MACs",
        "peak_gib": "peak memory",
    }
    for number in (1, 5, 6):
        table = paper[f"table{number}"]
        for printed in table["rows"][1:]:
            label = synthetic.ARMS[printed["arm"]][0]
            for column in table["columns"]:
                own = [c for c in claims if c.text.startswith(f"{label}:") and words[column] in c.text]
                assert any(str(number) in c.where for c in own), (number, label, column)
    for name, value in (("Abstract", "2.40"), ("Table 5", "2.74")):
        assert any(claim.where == name and value in claim.printed for claim in claims), name


def test_the_tables_own_gain_is_over_pesc(tmp_path):
    for replicate in range(2):
        synthetic.write_latency(tmp_path, replicate, machine=GPU, factors={"mola_loop": 0.1})
    claim = find_claim(by_text(tmp_path), "PESC over AdaFuse")
    assert claim.ours.ratio == pytest.approx(5.0 / 2.7, rel=0.02) and claim.verdict == IN_PART
    assert claim.printed == "≥ 2.74 (+174 %)"


def test_a_count_needs_no_gpu(tmp_path):
    """Whoever counts a real backbone on a CPU has counted it."""
    synthetic.write_latency(tmp_path, counted=7_000_000_000)
    claim = find_claim(by_text(tmp_path), "PESC", "parameters")
    assert claim.verdict == NOT_REPLICATED and claim.why.startswith("on CPU, tiny backbone: the added share")


def test_the_sheet_states_the_rules(tmp_path):
    synthetic.write_latency(tmp_path)
    text = markdown(sheet(find(load([tmp_path])).claims))
    assert (
        "Rules (`src/adafuse/report/verdicts.py`)" in text
        and "**not testable here**" in text
        and "one process: rounds only" in text
    )
