"""What the GPU records say, in sentences: every number is looked up, and a sentence without its records is left out.

In: latency, trace and drift cells. Out: lines of Markdown, the first thing that a reader of the README's block sees.
Next: readme.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from adafuse.adapters.geometry import widths
from adafuse.report import findings_controls as controls
from adafuse.report.cells import Cell, model_name
from adafuse.report.claims_latency import ADAFUSE, OTHERS, PAPER_GAIN
from adafuse.report.drift import traces
from adafuse.report.scans import scans
from adafuse.report.text import count_text, digits, process_text
from adafuse.report.timing import AGAIN, BASE, ArmResult, again, base_of, ratio, results
from adafuse.report.traces import timelines

GRAPH = "graph"
# of a shape: what the widths of its linears follow from
SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"}
GATHERED, LAYERWISE, SWITCHED = (
    "adafuse_gather_graph",
    "adafuse_layerwise_gather_graph",
    "adafuse_switch_graph",
)


def sentences(latency: Sequence[Cell], traced: Sequence[Cell], drifts: Sequence[Cell]) -> list[str]:
    """A bullet for each question that the records of a GPU answer; none where there is no such record."""
    timed = [cell for cell in latency if cell.rounds and not cell.is_cpu]
    # points of a scan stand in a table of their own
    points = {id(cell) for scan in scans(timed) for cell in scan.cells}
    lines = [
        *_each(timed, _eager),
        *_each([cell for cell in traced if not cell.is_cpu], _host),
        *_each(timed, lambda cell: controls.eager(cell, _place(cell))),
        *_each(timed, lambda cell: controls.peft(cell, _place(cell))),
        *_each([cell for cell in timed if id(cell) not in points], _captured),
        *_each(timed, lambda cell: controls.captured(cell, _place(cell))),
        *_each(_one_a_measurement(timed), _memory),
        *_captured_memory(timed),
        *_each([cell for cell in drifts if not cell.is_cpu], _drift),
    ]
    return [f"- {line}" for line in lines]


def _each(cells: Sequence[Cell], say: Callable[[Cell], str | None]) -> Iterator[str]:
    yield from (line for line in map(say, cells) if line)


def _model(cell: Cell) -> str:
    return f"{cell.machine['gpu']}, {model_name(cell.config)}"


def _place(cell: Cell) -> str:
    return f"{_model(cell)}, {_geometry(cell)}"


def _geometry(cell: Cell) -> str:
    experts = cell.config["experts"]
    targets = "all seven linears" if len(experts["targets"]) == 7 else ", ".join(experts["targets"])
    whole = ", whole queries" if cell.config["latency"].get("queries") else ""
    return f"rank {experts['rank']} on {targets}{whole}"


def _eager(cell: Cell) -> str | None:
    """Where the paper measured."""
    if not {BASE, ADAFUSE, *OTHERS} <= set(cell.config["arms"]["run"]) or cell.config["batch"] != 1:
        return None
    found = results(cell, [ADAFUSE, *OTHERS])
    timed = [arm for arm, result in found.items() if result.ms_per_token and result.ratio]
    fastest = fastest_other(found)
    if ADAFUSE not in timed or fastest is None:
        return None
    said = ", ".join(f"{found[arm].label} {process_text(found[arm].ratio)}" for arm in timed)
    noise = again(cell)
    return (
        f"**Where the paper measured: {_geometry(cell)}** (eager, batch 1; {_model(cell)}), a token costs, in units of "
        "the backbone's: "
        f"{said}{f'; the backbone against itself, {process_text(noise)}' if noise else ''}. AdaFuse is "
        f"{process_text(ratio(cell, fastest, ADAFUSE))} times faster than {found[fastest].label}, the fastest of the "
        f"others (paper: {PAPER_GAIN:g} and more).{_sizes(cell, [found[arm] for arm in timed])}"
    )


def _sizes(cell: Cell, found: list[ArmResult]) -> str:
    """How large the adapters are, and which of them do not stand on the cell's linears."""
    known = [own for own in found if own.cost.get("adapter_params")]
    if not known:
        return ""
    said = ", ".join(f"{own.label} {count_text(own.cost['adapter_params'])}" for own in known)
    methods, table = cell.config.get("methods", {}), cell.config["arms"]["table"]
    targets = set(cell.config["experts"]["targets"])
    apart = [own.label for own in known if _targets(methods.get(table[own.arm]["method"], {})) - targets]
    where = f"; not on the cell's linears but on those of its own paper: {', '.join(apart)}" if apart else ""
    return f" Parameters of the adapters: {said}{where}."


def _targets(method: Mapping[str, Any]) -> set[str]:
    """The linears that a method's own file names, whatever the cell's are."""
    return {*(method.get("expert_targets") or ()), *(method.get("static_targets") or ())}


def fastest_other(found: Mapping[str, ArmResult]) -> str | None:
    """The fastest of the adapters that AdaFuse is compared with, as their authors run them; None if none has a time."""
    timed = {arm: found[arm].ms_per_token or 0.0 for arm in OTHERS if found[arm].ratio}
    return min(timed, key=lambda arm: timed[arm], default=None)


def _host(cell: Cell) -> str | None:
    """Why: who waits for whom."""
    found = {line.arm: line for line in timelines(cell)}
    if ADAFUSE not in found or BASE not in found:
        return None
    own, base = found[ADAFUSE], found.get(AGAIN, found[BASE])
    switch_ms, more = own.line["parts_ms"]["switch"], own.line["launches"] - base.line["launches"]
    busy_ms, token_ms = sum(base.line["parts_ms"].values()), base.line["untraced_ms"]
    return (
        f"**Why**: launched eagerly, the host sets the pace. The GPU works for {digits(busy_ms)} of the "
        f"{digits(token_ms)} ms of the backbone's token (on the host that was traced) and idles for "
        f"{100 * (1 - busy_ms / token_ms):.0f} %; AdaFuse's switch takes {digits(switch_ms)} ms of GPU time and {more} "
        "launches more, so that it hides behind the host."
    )


def _captured(cell: Cell) -> str | None:
    """What is left of it without launches."""
    run = cell.config["arms"]["run"]
    if not {base_of(GRAPH), GATHERED, LAYERWISE, SWITCHED} <= set(run) or cell.config["batch"] != 1:
        return None
    found = results(cell, [GATHERED, LAYERWISE, SWITCHED])
    if not all(result.ratio for result in found.values()):
        return None
    one, many, merged = (process_text(found[arm].ratio) for arm in (GATHERED, LAYERWISE, SWITCHED))
    return (
        f"**Without launches: {_geometry(cell)}** (one CUDA graph, batch 1; {_model(cell)}), gathered experts cost "
        f"{one} with one gate for all layers and {many} with a gate per layer; the paper's switch {merged}, because "
        "it reads and writes every adapted weight once more. Time over the floor in bytes: gathered "
        f"{_over_floor(found[GATHERED])}, switch {_over_floor(found[SWITCHED])}."
    )


def _over_floor(result: ArmResult) -> str:
    return digits((result.ms_per_token or 0.0) / result.cost["floor_ms"])


def _one_a_measurement(timed: Sequence[Cell]) -> list[Cell]:
    """The first of the cells that share memory records: memory is measured apart, whatever arms are timed with."""
    first = {tuple(record.path for record in cell.memory): cell for cell in reversed(timed) if cell.memory}
    return list(reversed(first.values()))


def _memory(cell: Cell) -> str | None:
    """The paper's strategy beside the backbone, and the copy that it leaves out."""
    found = results(cell, [BASE, ADAFUSE])
    base, own = (found[arm].memory.get("peak_gib") for arm in (BASE, ADAFUSE))
    if not base or not own:
        return None
    copy_gib = _adapted_gib(cell)
    kept = (
        f": kept on the GPU, as in the cells that are timed, it is {digits(copy_gib)} GiB more, "
        f"{(own + copy_gib) / base:.2f} times in all"
        if copy_gib
        else ""
    )
    return (
        f"**Memory** ({_place(cell)}): merging in place peaks at {own / base:.3f} times the backbone's "
        f"{digits(base)} GiB. The clean copy of the adapted weights, without which rounding stays in them, is on the "
        f"host for that{kept}."
    )


def _adapted_gib(cell: Cell) -> float | None:
    """The weights of the adapted linears; None for a model from a folder, whose sizes stand in no record."""
    model, targets = cell.config["model"], cell.config["experts"]["targets"]
    shape = model.get("shape") or {}
    if not set(shape) >= SIZES:
        return None
    size = 4 if model["dtype"] == "float32" else 2
    each = widths(shape)
    return size * shape["num_hidden_layers"] * sum(math.prod(each[name]) for name in targets) / 2**30


def _captured_memory(timed: Sequence[Cell]) -> Iterator[str]:
    """What the captured strategies hold, from the cell that has most of them; copies that a graph reads count."""
    told = {id(cell): _peaks(cell) for cell in timed}
    cell = max(timed, key=lambda cell: len(told[id(cell)]), default=None)
    if cell is None or len(told[id(cell)]) < 2:
        return
    base, *others = told[id(cell)].items()
    said = ", ".join(f"{label} {peak / base[1]:.3f}" for label, peak in others)
    yield f"**Memory without launches** ({_place(cell)}), times the captured backbone's {digits(base[1])} GiB: {said}."


def _peaks(cell: Cell) -> dict[str, float]:
    """GiB by label: the captured backbone first, then AdaFuse's arms; empty without the backbone's."""
    run = cell.config["arms"]["run"]
    arms = [base_of(GRAPH), *(arm for arm in run if arm.startswith("adafuse_"))]
    if base_of(GRAPH) not in run:
        return {}
    peaks = {found.label: found.memory.get("peak_gib") for found in results(cell, arms).values()}
    known = {label: peak for label, peak in peaks.items() if peak}
    return known if next(iter(peaks)) in known else {}


def _drift(cell: Cell) -> str | None:
    """How far in-place merging strays, by dtype."""
    switched = [trace for trace in traces(cell) if trace.strategy == "switch"]
    ends = {trace.dtype: trace.values["weight_error"][-1] for trace in switched}
    said = [f"{100 * error:.2g} % of the weights' norm in {dtype}" for dtype, error in ends.items() if error]
    if not said:
        return None
    exact = all(all(trace.identical) for trace in traces(cell) if trace.strategy == "rebase")
    tail = "; merging from clean weights is bit-identical after any number" if exact else ""
    count = switched[0].switches[-1]
    return f"**Drift** ({_place(cell)}): {count:,} switches in place leave an error of {' and '.join(said)}{tail}."
