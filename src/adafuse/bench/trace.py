"""Where the time of one token goes, arm by arm: launches, what they are for, and the gaps between them.

In: a `Config`, the backbone, a record to write to. Out: a trace line per arm (the median of a few tokens), a spans line
with its timeline, a Chrome trace of that token as an artifact. The decoder is the one that bench/latency.py times; the
profiler and the scopes cost the host time of their own, so `untraced_ms` says what a token takes without them. A token
lasts from its first launch to the next token's first, as in a block that nobody interrupts; the gap is what of it no
launch fills. Arms are not checked here: latency cells do that. Next: trace_parts.py.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from adafuse import cell
from adafuse.bench import device, trace_parts, workload
from adafuse.bench.trace_parts import PlainParts, Token
from adafuse.config import Config, Runtime, StrategyName
from adafuse.engine.decoders import Decoder
from adafuse.engine.graph import Static
from adafuse.engine.make import make
from adafuse.records import Recorder
from adafuse.strategies.joined import make_room

# of these the median is kept; the profiler sees one before them, which pays for its start, and one that ends the last
TOKENS = 5
PROFILED = TOKENS + 2
# of settle and measured tokens each
WARM_PASSES = 6
# lanes of a trace's file
HOST, LAUNCHES = 0, 1
LANES = {HOST: "host", LAUNCHES: "launches"}


@dataclass(frozen=True)
class Traced:
    """The median token of one arm, its launches attributed; `unlinked` launches belong to no token."""

    token: Token
    captured: bool
    attributed_by: str
    disagreement: str | None
    unlinked: int
    untraced_ms: float


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Trace every arm of the cell and write its lines to `record`; `where` is the device."""
    prompt = workload.prompts(config, model, where)
    adapters = workload.adapters(config, model)
    for own in adapters.values():
        make_room(own)
    plain = trace_parts.plain_parts(model)
    _wake_profiler(where)
    settle = config.latency.settle_tokens
    length = config.context + settle + TOKENS + 2 * PROFILED
    # a process's first tokens load and allocate for the first time: the first arm would show that as its own gaps
    _warm(make(model, None, StrategyName.dense, Runtime.eager, length), prompt, settle)
    folder = Path(config.runs_dir) / "traces" / cell.record_path(config).stem
    for name in tqdm(config.arms.run, desc="traced arms", unit="arm"):
        arm = config.arms.table[name]
        try:
            decoder = make(model, adapters.get(arm.method), arm.strategy, arm.runtime, length)
            traced = trace(decoder, arm.runtime, prompt, settle, plain)
            _write(name, traced, folder / f"{name}.json.gz", record)
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)


def _warm(decoder: Decoder, prompt: Tensor, settle: int) -> None:
    """Tokens with and without the profiler: after the profiled ones alone, an H200's host took twice its time for the
    first arm's.
    """
    with decoder.installed():
        for _ in range(WARM_PASSES):
            decoder.start(prompt)
            with decoder.decoding():
                decoder.run(settle + TOKENS)
        decoder.start(prompt)
        with decoder.decoding():
            _profiled(lambda: _decode(decoder, decoder.run), prompt.device.type)


def trace(decoder: Decoder, runtime: Runtime, prompt: Tensor, settle: int, plain: PlainParts) -> Traced:
    """Decode behind the prompt and profile a few tokens; `plain` was taken when nothing was installed."""
    where = prompt.device.type
    captured = where == "cuda" and isinstance(decoder, Static)
    with decoder.installed():
        decoder.start(prompt)
        with decoder.decoding():
            decoder.run(settle)
            untraced_ms = device.timed_ms(where, lambda: decoder.run(TOKENS)) / TOKENS
            if captured:
                found = _of_graph(decoder, runtime, where, plain)
            else:
                with trace_parts.scopes(decoder.model, plain, decoder.adapter):
                    tokens, unlinked = _profiled(lambda: _decode(decoder, decoder.run), where)
                found = _median(tokens), "scopes", None, unlinked
    token, attributed_by, disagreement, unlinked = found
    return Traced(token, captured, attributed_by, disagreement, unlinked, untraced_ms)


def _of_graph(
    decoder: Decoder, runtime: Runtime, where: str, plain: PlainParts
) -> tuple[Token, str, str | None, int]:
    """Replays, and the same step one launch after the other, whose scopes say what the replays' launches are for.

    What torch.compile fused belongs to no scope any more, so there names decide.
    """
    assert isinstance(decoder, Static)
    tokens, unlinked = _profiled(lambda: _decode(decoder, decoder.run), where)
    token, disagreement = _median(tokens), None
    if runtime is Runtime.graph:
        with trace_parts.scopes(decoder.model, plain, decoder.adapter):
            stepped, _ = _profiled(lambda: _decode(decoder, decoder.run_uncaptured), where)
        launches, disagreement = trace_parts.by_replay_order(token.launches, stepped[0].launches)
        if disagreement is None:
            return replace(token, launches=launches), "replay order", None, unlinked
    return replace(token, launches=trace_parts.by_name(token.launches)), "names", disagreement, unlinked


def _decode(decoder: Decoder, run: Callable[[int], object]) -> None:
    """PROFILED tokens, each with a mark where it begins; eager runs of one token would add a launch to each."""
    if isinstance(decoder, Static):
        for _ in range(PROFILED):
            trace_parts.mark()
            run(1)
        return
    with trace_parts.marks(decoder.model):
        run(PROFILED)


def _profiled(work: Callable[[], None], where: str) -> tuple[list[Token], int]:
    """The tokens that `work` decodes but the first, and how many launches could not be linked to one."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where == "cuda" else [])]
    _drain(where)
    with profile(activities=activities) as profiler:
        work()
        _drain(where)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    tokens, unlinked = trace_parts.tokens_of(events, on_gpu=where == "cuda")
    return tokens[1:], unlinked


def _wake_profiler(where: str) -> None:
    """Before anything is captured: a profiler that starts later may not see into a graph, and one that was taken down
    between two arms may break it.
    """
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    if where == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):
            torch.ones(1, device=where).add_(1.0)
            _drain(where)


def _drain(where: str) -> None:
    if where == "cuda":
        torch.cuda.synchronize()


def _median(tokens: list[Token]) -> Token:
    return sorted(tokens, key=lambda token: token.length_us)[len(tokens) // 2]


def _write(name: str, traced: Traced, path: Path, record: Recorder) -> None:
    token = traced.token
    launches, parts = token.launches, trace_parts.parts_ms(token.launches)
    token_ms = token.length_us / 1e3
    record.write(
        "trace",
        arm=name,
        tokens=TOKENS,
        token_ms=token_ms,
        untraced_ms=traced.untraced_ms,
        launches=len(launches),
        host_launches=len({launch.call for launch in launches}),
        graph_nodes=len(launches) if traced.captured else None,
        parts_ms=parts,
        gap_ms=token_ms - sum(parts.values()),
        attributed_by=traced.attributed_by,
        disagreement=traced.disagreement,
        unlinked=traced.unlinked,
    )
    begin_us = token.begin_us
    spans = [[round(x.start_us - begin_us, 3), round(x.length_us, 3), x.part] for x in launches]
    record.write("spans", arm=name, spans=spans)
    record.write("artifact", path=str(path), sha256=write_chrome(token, path), arm=name)


def write_chrome(token: Token, path: Path) -> str:
    """Write what the host did and what was launched for chrome://tracing and Perfetto; gives the file's SHA-256.

    The same token gives the same bytes: written anew rather than copied from the profiler, whose own file names the
    host, the process and its folders; times count from the first event.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begin_us = min([token.begin_us, *(event["ts"] for event in token.host)])
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": lane, "tid": 0, "args": {"name": name}}
        for lane, name in LANES.items()
    ]
    rows += [_row(HOST, e["cat"], e["name"], e["ts"] - begin_us, e["dur"]) for e in token.host]
    rows += [_row(LAUNCHES, x.part, x.name, x.start_us - begin_us, x.length_us) for x in token.launches]
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": rows}, separators=(",", ":"))
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(text.encode())
    return cell.file_hash(path)


def _row(lane: int, category: str, name: str, start_us: float, length_us: float) -> dict[str, Any]:
    times = {"ts": round(start_us, 3), "dur": round(length_us, 3)}
    return {"ph": "X", "cat": category, "name": name, "pid": lane, "tid": 0, **times}
