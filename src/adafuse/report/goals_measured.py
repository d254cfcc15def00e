"""What the records say about a goal: a ratio of arms on the shape of Llama-2-7B, or the worst line of a kernel.

In: latency and kernel cells of one GPU. Out: `Measured`, with words for what was looked at and what is not there.
Next: kernels.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adafuse.config import LINEARS
from adafuse.report.cells import Cell
from adafuse.report.kernels import check_text, failures, lines
from adafuse.report.sheet import Row
from adafuse.report.text import ratio_text
from adafuse.report.timing import BASE, GEMV, ArmResult, base_of, missing, ratio, results
from adafuse.stats import Interval

SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
CONTEXT = 128


@dataclass(frozen=True)
class Measured:
    """A value with its interval if it is a ratio; `failed` if a line that counts has no time."""

    value: float | None
    interval: Interval | None
    said: str
    files: list[str] = field(default_factory=list)
    failed: bool = False


def cost(latency: list[Cell], arm: str, rank: int, batch: int) -> Measured:
    """Of `arm` over the plain backbone in the same runtime: graph and compiled are listed, the better one counts."""
    own = [cell for cell in latency if _is_ours(cell, rank, batch, CONTEXT)]
    found = {runtime: _of_arm(own, f"{arm}_{runtime}") for runtime in ("graph", "compiled")}
    said = "; ".join(f"{runtime}: {_cost_text(result)}" for runtime, result in found.items())
    timed = [(result.ratio, result.files) for result in found.values() if result and result.ratio]
    if not timed:
        return Measured(None, None, said)
    best, files = min(timed, key=lambda pair: pair[0].ratio)
    return Measured(best.ratio, best, said, files)


def bandwidth(latency: list[Cell], rank: int, batch: int) -> Measured:
    """Of the read bandwidth, what the plain backbone uses: each runtime is listed, and beside it the backbone through
    our own product; the best plain one counts.
    """
    own = [cell for cell in latency if _is_ours(cell, rank, batch, CONTEXT)]
    arms = [base_of(runtime, base) for runtime in ("graph", "compiled") for base in (BASE, GEMV)]
    found = {arm: _of_arm(own, arm) for arm in arms}
    shares = {
        arm: result.bandwidth_share for arm, result in found.items() if result and result.bandwidth_share
    }
    said = "; ".join(
        f"{arm}: {100 * shares[arm]:.0f} %" if arm in shares else f"{arm}: not run" for arm in arms
    )
    plain = {arm: share for arm, share in shares.items() if not arm.startswith(GEMV)}
    if not plain:
        return Measured(None, None, said)
    best = max(plain, key=lambda arm: plain[arm])
    result = found[best]
    assert result is not None
    return Measured(plain[best], None, said, result.files)


def gain(latency: list[Cell], slow: tuple[str, ...], fast: str, rank: int, batch: int) -> Measured:
    """Each slow arm over the fast one of its own cell: all are listed, the fastest counts."""
    own = [cell for cell in latency if _is_ours(cell, rank, batch)]
    found: dict[str, tuple[Interval, Cell]] = {}
    for cell in own:
        for arm in slow:
            one = ratio(cell, arm, fast)
            if one and (arm not in found or one.n_processes > found[arm][0].n_processes):
                found[arm] = one, cell
    said = "; ".join(
        f"{arm}: {ratio_text(found[arm][0]) if arm in found else _absent(own, arm)}" for arm in slow
    )
    if not found:
        return Measured(None, None, said)
    least, cell = min(found.values(), key=lambda pair: pair[0].ratio)
    return Measured(least.ratio, least, said, results(cell, [fast])[fast].files)


def worst_line(kernels: list[Cell], kernel: str, name: str, largest: bool, where: dict[str, Any]) -> Measured:
    """Of all bfloat16 lines of `kernel`, or of those of Llama-2-7B's shape that agree with `where`."""
    cells = [cell for cell in kernels if not where or _is_shape(cell)]
    rows = [
        row for cell in cells for row in lines(cell) if row["kernel"] == kernel and row["dtype"] == "bfloat16"
    ]
    rows = [row for row in rows if all(row[key] == value for key, value in where.items())]
    broken = [said for cell in cells for said in failures(cell, kernel)]
    if not rows:
        return Measured(None, None, "; ".join(broken) or "not run: experiment=kernels")
    files = list(dict.fromkeys(file for row in rows for file in row["records"]))
    failed = next((row for row in rows if row[name] is None), None)
    if failed or (broken and not where):
        said = f"{_size(failed)}: check {check_text(failed)}" if failed else broken[0]
        return Measured(None, None, said, files, failed=True)
    worst = (max if largest else min)(rows, key=lambda row: row[name])
    count = f", the worst of {len(rows)} lines" if len(rows) > 1 else ""
    return Measured(worst[name], None, _size(worst) + count, files)


def _of_arm(own: list[Cell], arm: str) -> ArmResult | None:
    """From the cell with most processes, then rounds; a cell without a ratio only if there is no other."""
    held = [results(cell, [arm])[arm] for cell in own if arm in cell.config["arms"]["run"]]

    def weight(result: ArmResult) -> tuple[int, int]:
        return (result.ratio.n_processes, result.ratio.n_rounds) if result.ratio else (0, 0)

    return max(held, key=weight, default=None)


def _cost_text(result: ArmResult | None) -> str:
    if result is None:
        return "not run"
    said = ratio_text(result.ratio, result.resolved, result.reason or result.to_base.reason)
    if result.ratio and result.to_gemv:
        gemv = ratio_text(result.to_gemv.ratio, result.to_gemv.resolved, result.to_gemv.reason)
        said += f" (to the backbone through our GEMV: {gemv})"
    return said + (f", {result.ratio.method}" if result.ratio and result.ratio.n_processes == 1 else "")


def _absent(own: list[Cell], arm: str) -> str:
    held = [cell for cell in own if arm in cell.config["arms"]["run"]]
    return missing(held[0], arm) if held else "not run"


def _size(row: Row) -> str:
    return f"{row['model']}, {row['targets']}, rank {row['rank']}"


def _is_ours(cell: Cell, rank: int, batch: int, context: int | None = None) -> bool:
    """The shape, experts and workload that the goals are about."""
    config = cell.config
    experts = config.get("experts", {})
    return (
        _is_shape(cell)
        and experts.get("rank") == rank
        and set(experts.get("targets", [])) == set(LINEARS)
        and config.get("batch") == batch
        and context in (None, config.get("context"))
    )


def _is_shape(cell: Cell) -> bool:
    """Llama-2-7B by its sizes, as a name may be kept while a size is overridden; top-2 of 8 experts."""
    model, experts = cell.config.get("model", {}), cell.config.get("experts", {})
    same = all((model.get("shape") or {}).get(name) == value for name, value in SHAPE.items())
    own = same and not model.get("path") and model.get("dtype") == "bfloat16"
    return own and (experts.get("count"), experts.get("top_k")) == (8, 2)
