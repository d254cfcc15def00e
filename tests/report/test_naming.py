"""What things are called."""

import pytest

from adafuse.report.frames import frames
from adafuse.report.naming import arms_of, caption, cell_key, rank, title

EXPERTS = " · 8 experts of rank 16, top-2, on q, k, v, o, gate, up, down"


def run_of(record):
    return frames([record]).runs.iloc[0]


def test_the_key_of_a_cell_tells_what_replicates_share(made):
    assert cell_key(run_of(made("a"))) == "h200 tiny bf16 all r16 b1 c64 paper"
    odd = run_of(
        made("a", latency={"gates": "zipf", "bypass_share": 0.25, "queries": True, "block_tokens": 200})
    )
    assert cell_key(odd).endswith("paper gates=zipf bypass=0.25 queries=200")
    few = {"targets": ["q_proj", "v_proj"], "rank": 8, "count": 4, "top_k": 1}
    assert cell_key(run_of(made("a", experts=few)), swept=["rank"]).startswith(
        "h200 tiny bf16 qv r* x4 top1 b1"
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("latency", f", bfloat16{EXPERTS} · batch 1 · context 64 · arms=paper"),
        ("memory", f", bfloat16{EXPERTS} · batch 1 · context 64 · memory only"),
        ("layer", ", bfloat16 · 8 experts, top-2, on one linear · rank 16"),
        ("kernel", ", bfloat16 · 8 experts, top-2"),
        ("drift", EXPERTS),
    ],
)
def test_titles(made, task, expected):
    assert title(run_of(made("a", task))) == f"NVIDIA H200 · tiny{expected}"


def test_an_unusual_workload_is_in_the_title(made):
    run = run_of(
        made("a", latency={"gates": "uniform", "bypass_share": 0.25, "queries": True, "block_tokens": 200})
    )
    assert " · gates uniform · 25 % of tokens bypassed · whole queries of 200 new tokens · " in title(run)


def test_the_heading_of_a_study_names_its_data_and_budget(made):
    data = {"name": "domain", "level": 3, "path": None}
    assert title(run_of(made("a", "evaluate", data=data, budget="equal"))).endswith(
        " · data domain, level 3 · equal parameters"
    )
    own = run_of(made("a", "evaluate", data={"name": "local", "path": "/home/me/riddles"}))
    assert title(own).endswith(" · data riddles · published sizes")


def test_a_caption_says_where_numbers_come_from_and_what_was_left_out(made):
    records = [made("a"), made("b", status="unfinished", header={"commit": None, "dirty": True})]
    assert caption(frames(records).runs) == (
        "Xeon, 16 cores, 125.9 GiB · NVIDIA H200, driver 580.1 · torch 2.11.0 · profile gpu · "
        "commit 0123456789ab, unknown (dirty) · 1 record of 1 host · "
        "left out as unfinished: latency/tiny-b.jsonl.partial"
    )


def test_arms_are_called_as_their_own_record_has_it(made):
    mended = {"arm_versions": {"base": 1, "adafuse_switch": 2}}
    found = arms_of(run_of(made("a", arms=["base", "adafuse_switch", "unheard_of"], header=mended)))
    assert list(found) == ["base", "adafuse_switch", "unheard_of"]
    assert found["adafuse_switch"] == ("AdaFuse (switch)", "adafuse", "token", "switch", "eager", 2)
    assert (found["base"].version, found["unheard_of"].version) == (1, 1)
    assert found["unheard_of"].label == "unheard_of"


def test_methods_stand_in_the_order_of_every_table_with_their_settings_behind_them():
    names = ["adafuse (top_k=1)", "other", "adafuse", "lora", "base"]
    assert sorted(names, key=rank) == ["base", "lora", "adafuse", "adafuse (top_k=1)", "other"]
