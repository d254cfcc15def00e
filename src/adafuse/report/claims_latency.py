"""Claims about time, memory and size: Tables 1, 5 and 6 and the abstract's speed-up, for one latency cell.

In: a latency cell and the paper's numbers. Out: claims. Next: claims_accuracy.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from adafuse.report import verdicts
from adafuse.report.cells import Cell, title
from adafuse.report.paper import by_arm
from adafuse.report.text import percent_text
from adafuse.report.timing import BASE, ArmResult, again, missing, ratio, results
from adafuse.report.verdicts import CLOSE_MEMORY, NOT_TESTABLE, Claim, Sense, on_cell, timed_on
from adafuse.stats import Interval, is_resolved

ADAFUSE = "adafuse_switch"
OTHERS = ("mola_loop", "pesc_loop", "moral_loop")
# how many times faster than other dynamic adapters, by the abstract
PAPER_GAIN = 2.4
ORDER = ("moral_loop", "moral_simple_merge", "adafuse_simple_merge", ADAFUSE, BASE)


def latency_claims(cell: Cell, paper: dict[str, Any]) -> list[Claim]:
    five, six = by_arm(paper["table5"]), by_arm(paper["table6"])
    found = results(cell, list(five | six))
    claims = []
    for arm in OTHERS:
        claims.append(_against_base(cell, found[arm], "Tables 1, 5", five, "about"))
    claims.append(_against_base(cell, found[ADAFUSE], "Tables 5, 6", five, "at_most"))
    claims.append(_speedup(cell, paper))
    claims.append(_over_adafuse(cell, "pesc_loop", five))
    for arm in ORDER[:3]:
        claims.append(_against_base(cell, found[arm], "Table 6", six, "about"))
    claims.append(_ordering(cell, found))
    claims += memory_claims(cell, paper)
    claims += _costs(cell, found, by_arm(paper["table1"]))
    printed = ", ".join(f"{row['label']} {row['ms_per_token']}" for row in paper["table5"]["rows"])
    why = f"shown, never compared: {paper['absolute_ms']['why']}"
    base = found[BASE].ms_per_token
    ours = f"backbone {base:.3g} ms" if base else None
    claims.append(
        Claim(
            title(cell),
            "Tables 1, 5, 6",
            "absolute ms per token",
            printed,
            ours,
            NOT_TESTABLE,
            why,
            found[BASE].files,
        )
    )
    return claims


def is_of_time(claim: Claim) -> bool:
    """True for what a token takes: not for memory and counts, nor for milliseconds, which nobody compares."""
    return "a token" in claim.text or "fastest other" in claim.text or "slower than the next" in claim.text


def memory_claims(cell: Cell, paper: dict[str, Any]) -> list[Claim]:
    """Peak memory of Table 5's rows over the backbone's; like time, a cost of AdaFuse's and a number of the others."""
    five = by_arm(paper["table5"])
    found = results(cell, list(five))
    claims = [_memory(cell, found[ADAFUSE], found[BASE], five, "at_most")]
    return claims + [_memory(cell, found[arm], found[BASE], five, "about") for arm in OTHERS]


def _against_base(cell: Cell, result: ArmResult, where: str, printed: dict[str, Any], sense: Sense) -> Claim:
    value = printed[result.arm]["ms_per_token"] / printed[BASE]["ms_per_token"]
    word = {"about": "costs", "at_most": "costs no more than", "at_least": "costs at least"}[sense]
    text = f"{result.label}: a token {word} {value:.2f} times the backbone's"
    return _ratio_claim(cell, where, text, value, result.ratio, sense, result.reason, result.files)


def _speedup(cell: Cell, paper: dict[str, Any]) -> Claim:
    """The fastest other dynamic adapter over AdaFuse, chosen by our own medians."""
    found = results(cell, [*OTHERS, ADAFUSE])
    timed = {arm: found[arm].ms_per_token for arm in OTHERS if found[arm].ms_per_token is not None}
    value = float(paper["text"]["speedup_over_dynamic"]["value"])
    files, reason = found[ADAFUSE].files, found[ADAFUSE].reason
    if not timed:
        reason = reason or f"no other dynamic adapter was timed: {missing(cell, OTHERS[0])}"
        return _ratio_claim(
            cell,
            "Abstract",
            "fastest other dynamic adapter over AdaFuse",
            value,
            None,
            "at_least",
            reason,
            files,
        )
    fastest = min(timed, key=lambda arm: timed[arm] or 0.0)
    text = f"fastest other dynamic adapter (here {found[fastest].label}) over AdaFuse"
    claim = _ratio_claim(
        cell, "Abstract", text, value, ratio(cell, fastest, ADAFUSE), "at_least", reason, files
    )
    left_out = [found[arm].label for arm in OTHERS if arm not in timed]
    claim.why += f"; not among them, for want of a time: {', '.join(left_out)}" if left_out else ""
    return claim


def _over_adafuse(cell: Cell, arm: str, printed: dict[str, Any]) -> Claim:
    """The same gain by the table's own numbers, against the adapter that is fastest there."""
    value = printed[arm]["ms_per_token"] / printed[ADAFUSE]["ms_per_token"]
    found = results(cell, [arm, ADAFUSE])
    reason = found[arm].reason or found[ADAFUSE].reason
    text = f"{found[arm].label} over {found[ADAFUSE].label}: a token costs at least {value:.2f} times as much"
    files = list(dict.fromkeys([*found[arm].files, *found[ADAFUSE].files]))
    return _ratio_claim(cell, "Table 5", text, value, ratio(cell, arm, ADAFUSE), "at_least", reason, files)


def _ratio_claim(
    cell: Cell,
    where: str,
    text: str,
    value: float,
    ours: Interval | None,
    sense: Sense,
    reason: str | None,
    files: list[str],
) -> Claim:
    verdict, why = verdicts.judge_ratio(
        value, ours, sense, ours is None or is_resolved(ours, again(cell)), reason
    )
    return Claim(title(cell), where, text, _printed(value, sense), ours, *timed_on(cell, verdict, why), files)


def _printed(value: float, sense: Sense) -> str:
    sign = {"about": "", "at_most": "≤ ", "at_least": "≥ "}[sense]
    return f"{sign}{value:.2f} ({percent_text(value)})"


def _ordering(cell: Cell, found: dict[str, ArmResult]) -> Claim:
    """Each row of Table 6 slower than the next."""
    steps: list[tuple[str, str, bool | None, str | None]] = []
    for slow, fast in pairwise(ORDER):
        step = ratio(cell, slow, fast)
        if step is None:
            absent = next(arm for arm in (slow, fast) if found[arm].ms_per_token is None)
            steps.append((slow, fast, None, found[absent].reason))
        else:
            slower = step.low > 1 and is_resolved(step, again(cell))
            steps.append((slow, fast, slower, None))
    verdict, why = verdicts.judge_order(
        [(found[slow].label, found[fast].label, slower, reason) for slow, fast, slower, reason in steps]
    )
    ours = f"{sum(bool(step[2]) for step in steps)} of {len(steps)} steps"
    text = "each row slower than the next: " + " > ".join(found[arm].label for arm in ORDER)
    return Claim(
        title(cell), "Table 6", text, "4 of 4 steps", ours, *timed_on(cell, verdict, why), found[BASE].files
    )


def _memory(cell: Cell, result: ArmResult, base: ArmResult, printed: dict[str, Any], sense: Sense) -> Claim:
    value = printed[result.arm]["peak_gib"] / printed[BASE]["peak_gib"]
    ours, low = result.memory.get("peak_gib"), base.memory.get("peak_gib")
    found = _exact(ours / low, "one process each") if ours and low else None
    reason = _no_peak(result) or (f"of the backbone, {_no_peak(base)}" if _no_peak(base) else None)
    verdict, why = verdicts.judge_ratio(value, found, sense, True, reason, CLOSE_MEMORY)
    return Claim(
        title(cell),
        "Table 5",
        f"{result.label}: peak memory over the backbone's",
        _printed(value, sense),
        found,
        *timed_on(cell, verdict, why),
        list(dict.fromkeys([*result.files, *base.files])),
    )


def _no_peak(result: ArmResult) -> str | None:
    """Why there is no peak; a line with a process but no peak was measured where there is none."""
    if result.memory.get("peak_gib") is not None:
        return None
    return "a peak needs a GPU" if "process_gib" in result.memory else str(result.memory.get("note"))


def _costs(cell: Cell, found: dict[str, ArmResult], printed: dict[str, Any]) -> list[Claim]:
    claims = []
    for arm in OTHERS:
        for field_name, column, word in (
            ("params", "params_b", "parameters"),
            ("macs", "macs_g", "MACs per token"),
        ):
            value = printed[arm][column] / printed[BASE][column]
            ours, base = found[arm].cost.get(field_name), found[BASE].cost.get(field_name)
            interval = _exact(ours / base) if ours and base else None
            verdict, why = verdicts.judge_cost(
                value, interval, found[BASE].cost.get("params"), found[arm].reason
            )
            text = f"{found[arm].label}: {word} over the backbone's"
            shown = f"{value:.4f} ({percent_text(value)})"
            claims.append(
                Claim(
                    title(cell),
                    "Table 1",
                    text,
                    shown,
                    interval,
                    verdict,
                    # a count, which no device changes
                    on_cell(cell, why),
                    found[arm].files,
                )
            )
    return claims


def _exact(value: float, method: str = "counted") -> Interval:
    """A ratio without an interval: what it is made of is counted, or does not vary."""
    return Interval(value, value, value, 1, 0, method)
