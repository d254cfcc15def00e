"""A latency cell in memory: arms of one adapter, checked and timed as latency.py does it, as a frame.

In: a plain model, its adapter (or None), arms by name. Out: a row for every arm: milliseconds a token and their ratio
to the backbone in the same runtime, with 95 % intervals over the rounds of this one process, the checks, and why there
is no number where there is none. Next: api.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from adafuse import stats
from adafuse.bench import calibration
from adafuse.bench.latency import NOTHING, Made, time_arms
from adafuse.config import Latency, Runtime

BACKBONE = "backbone"
NUMBERS = ("ms_per_token", "low", "high", "ratio", "ratio_low", "ratio_high")


class Lines:
    """A record that is kept in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, kind: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, **fields})

    def fail(self, where: str, error: BaseException) -> None:
        self.write("error", where=where, message=" ".join(str(error).split()) or type(error).__name__)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def backbone(runtime: Runtime) -> str:
    """The name of the plain backbone's arm in a runtime."""
    return BACKBONE if runtime is Runtime.eager else f"{BACKBONE}/{runtime.name}"


def measure(
    model: nn.Module,
    arms: Mapping[str, Made],
    refused: Mapping[str, str],
    batch: int,
    context: int,
    knobs: Latency,
    seed: int,
) -> pd.DataFrame:
    """Time `arms` on seeded ids [batch, context]; those in `refused` have a row with the reason alone."""
    where, record = model.device.type, Lines()

    def ask(query: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + query)
        return torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(model.device)

    counted = time_arms(model, arms, ask, knobs, seed, calibration.calibrate(where)["read_gbps"], record)  # type: ignore[arg-type]
    rows = [
        _row(name, arm, record, "" if counted else NOTHING[counted is None]) for name, arm in arms.items()
    ]
    rows += [{"arm": name, "reason": reason} for name, reason in refused.items()]
    return pd.DataFrame(rows).set_index("arm")


def _row(name: str, arm: Made, record: Lines, nothing: str) -> dict[str, Any]:
    own = _ms(name, record)
    base = _ms(backbone(arm.runtime), record)
    both = sorted(set(own) & set(base))
    row: dict[str, Any] = {"arm": name, "rounds": len(own), **dict.fromkeys(NUMBERS, math.nan)}
    if own:
        row |= _interval("ms_per_token", "", list(own.values()), [1.0] * len(own))
    if both:
        row |= _interval("ratio", "ratio_", [own[n] for n in both], [base[n] for n in both])
    row["floor_ms"] = next((line["floor_ms"] for line in record.of("cost") if line["arm"] == name), math.nan)
    row["reason"] = "" if own else _why(name, record) or nothing
    return row | {f"check_{one['check']}": one["value"] for one in record.of("check") if one["arm"] == name}


def _interval(name: str, prefix: str, values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    found = stats.paired_ratio([(values, base)])
    return {name: found.ratio, f"{prefix}low": found.low, f"{prefix}high": found.high}


def _ms(name: str, record: Lines) -> dict[int, float]:
    """Milliseconds a token of the blocks that count, by round."""
    flagged = {(line["arm"], line["round"]) for line in record.of("flag")}
    return {
        line["round"]: line["block_ms"] / line["tokens"]
        for line in record.of("block")
        if line["arm"] == name and not line["excluded"] and (name, line["round"]) not in flagged
    }


def _why(name: str, record: Lines) -> str:
    """The check that was not met, the error, or why its blocks do not count."""
    checks = [line for line in record.of("check") if line["arm"] == name and not line["passed"]]
    errors = [line["message"] for line in record.of("error") if line["where"] == f"arm {name}"]
    excluded = [line["excluded"] for line in record.of("block") if line["arm"] == name and line["excluded"]]
    flags = [line["reason"] for line in record.of("flag") if line["arm"] == name]
    said = [
        check["detail"]
        if check["check"] == "runs"
        else f"check {check['check']}: {check['value']:.3g} exceeds {check['bound']:.3g}, {check['detail']}"
        for check in checks
    ]
    return next(iter([*said, *errors, *excluded, *flags]), "")
