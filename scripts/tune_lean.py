"""How the launches of runtime lean are cut best: python scripts/tune_lean.py llama2_7b 1 qkv,out,gate_up,down,head

In: a backbone of conf/model, a batch, parts. Out: a line of JSON for each cut in --out, beside GB/s and their share of
what is read here at most; a cut that has a line is not measured again, and nothing new begins after --seconds. `best`
prints the fastest of each shape as entries of LEAN_CUTS (kernels/config.py); `attend` tries cuts of attention at
several contexts; `step` times whole steps of the --arms, with the fastest cuts so far, with and without launches that
start early. Products with experts beside them are those of --arms adafuse_gather_lean. Random weights; eight blocks'
launches of one kind in one CUDA graph, the whole depth for `step`. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product as combinations
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adafuse import compose
from adafuse.bench import calibration, device, workload
from adafuse.bench.kernel import pass_ms
from adafuse.config import Config
from adafuse.engine import lean as engine
from adafuse.engine.make import make
from adafuse.kernels import attend, config, lean
from adafuse.kernels.beside import DOWN, neighbours
from adafuse.kernels.config import AttendCut, LeanCut
from adafuse.model import backbone

PRODUCTS = ("qkv", "out", "gate_up", "down", "head")
STEP_ARMS = "base_lean,adafuse_gather_lean,adafuse_layerwise_gather_lean"
BLOCKS, REPLAYS, TOKENS = 8, 20, 64
CONTEXTS = (160, 1024, 3900)

Line = dict[str, Any]


def cuts(tokens: int, gated: bool, experts: bool) -> list[LeanCut]:
    """What is tried: without tensor cores 32 to 64 weights a thread at once, with experts one tile a program and two,
    of which the second never waits; with tensor cores 16 to 128 rows.
    """
    if tokens <= config.GEMV_TOKENS:
        tried = combinations((2, 4, 8, 16), (512, 1024, 2048, 4096), (4, 8), (1, 2, 4))
        return [LeanCut(r, b, w, tiles=t) for r, b, w, t in tried if 32 <= r * b // (32 * w) <= 64]
    sides = (32, 64, 128) if gated else (16, 32, 64)
    deep = combinations(sides, (128, 256), (4, 8), (3, 5))
    return [LeanCut(r, b, w, s, 16) for r, b, w, s in deep if r * b * s <= 96 * 1024]


def attend_cuts(sequences: int, heads: int) -> list[AttendCut]:
    most = -(-2 * config.MULTIPROCESSORS // (sequences * heads))
    tried = combinations((64, 128), (most, 2 * most), (128, 256), (2, 4, 8))
    return [AttendCut(*cut) for cut in tried if cut[2] >= cut[0]]


def composed(name: str, batch: int, blocks: int | None, arms: str) -> Config:
    """The cell's configuration."""
    overrides = ["profile=gpu", f"model={name}", f"batch={batch}", "context=128", f"arms.run=[{arms}]"]
    overrides += ["task=latency"] + ([f"model.shape.num_hidden_layers={blocks}"] if blocks else [])
    return compose.composed(overrides)


@contextmanager
def ready(settings: Config, model: torch.nn.Module, arm: str, length: int) -> Iterator[engine.Lean]:
    """The arm's decoder behind a prompt, installed."""
    own = settings.arms.table[arm]
    adapter = workload.adapters(settings, model).get(own.method)
    decoder = make(model, adapter, own.strategy, own.runtime, length)
    assert isinstance(decoder, engine.Lean)
    with decoder.installed():
        decoder.start(workload.prompts(settings, model, str(model.device)))
        yield decoder


def works(plan: engine.Plan, part: str) -> list[lean.Product]:
    return (
        [plan.head] * len(plan.blocks) if part == "head" else [getattr(block, part) for block in plan.blocks]
    )


def recut(work: lean.Product, cut: LeanCut) -> lean.Product:
    """The launch with another cut, and room for as many sums of squares as that has tiles; each as most of them are,
    behind a decision that was taken long before.
    """
    beside = work.beside and replace(work.beside, ready=work.beside.logits is None)
    work = replace(work, cut=cut, beside=beside, alone=False)
    if work.residual is None:
        return work
    tiles = config.cdiv(work.outputs, work.fitted().rows)
    squares = work.x_TI.new_empty(len(work.x_TI), tiles, dtype=torch.float32)
    return replace(work, residual=replace(work.residual, squares_TP=squares))


def launch_all(launch: Callable[[Any], None], each: list[Any], flags: Tensor | None) -> None:
    """One pass; with experts the flags that the last pass raised are lowered first, as a step's last launch does."""
    if flags is not None and each[0].beside is not None:
        flags.fill_(DOWN)
    for work in each:
        launch(work)


def measure(tried: Line, nbytes: float, launch: Callable[[], None], read_gbps: float, where: str) -> Line:
    """A line of one cut; of one that does not run (shared memory) its error."""
    try:
        ms = pass_ms(where, launch, REPLAYS)
    except Exception as error:  # the other cuts go on
        return tried | {"error": str(error).splitlines()[0][:120]}
    gbps = nbytes / ms / 1e6
    return tried | {
        "us": round(ms * 1e3 / BLOCKS, 2),
        "gbps": round(gbps),
        "share": round(gbps / read_gbps, 3),
    }


def sweep(settings: Config, parts: list[str], seen: Notes | Share) -> None:
    """Products of the first arm, and attention, each kind by itself."""
    model, batch, name = backbone.load(settings)[0].eval(), settings.batch, settings.model.name
    with ready(settings, model, settings.arms.run[0], max(CONTEXTS) + TOKENS) as decoder:
        plan = engine.make_plan(decoder)
        for part in [part for part in parts if part in PRODUCTS]:
            first = works(plan, part)[0]
            shape = {
                "model": name,
                "part": part,
                "tokens": batch,
                "inputs": first.x_TI.shape[1],
                "outputs": first.outputs,
                "experts": neighbours(first.beside),
            }
            for cut in cuts(batch, first.gated, first.beside is not None):
                own = [recut(work, cut) for work in works(plan, part)]
                nbytes = sum(work.weight_OI.nbytes for work in own if work.weight_OI is not None)
                seen.add(shape | asdict(cut), nbytes, partial(launch_all, lean.product, own, plan.next.flags))
        if "attend" in parts:
            first_attend = plan.blocks[0].attend
            sequences, heads, _, width = first_attend.keys.shape
            group = first_attend.out.shape[1] // (heads * width)
            for context, tried in combinations(CONTEXTS, attend_cuts(sequences, heads)):
                own_room = attend.room(sequences, heads, group, width, tried, model.device)
                place = torch.tensor([context], device=model.device)
                launches = [
                    replace(block.attend, cut=tried, partial=own_room, position=place)
                    for block in plan.blocks
                ]
                nbytes = 2 * BLOCKS * sequences * heads * context * width * first_attend.keys.itemsize
                line = {"model": name, "part": "attend", "tokens": batch, "context": context} | asdict(tried)
                seen.add(line, nbytes, partial(launch_all, attend.attend, launches, None))


def steps(settings: Config, seen: Notes) -> None:
    """Whole steps: milliseconds a token of the batch, and the weights' bytes over them."""
    model = backbone.load(settings)[0].eval()
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    config.LEAN_CUTS.update(seen.best())
    for arm, early in combinations(settings.arms.run, (True, False)):
        line = {
            "model": settings.model.name,
            "part": "step",
            "tokens": settings.batch,
            "arm": arm,
            "early": early,
        }
        if seen.has(line):
            continue
        with (
            nullcontext() if early else late_launches(),
            ready(settings, model, arm, 128 + 2 * TOKENS) as decoder,
        ):
            found, ids = [], workload.prompts(settings, model, str(model.device))
            # the first block captures, and is left out
            for _ in range(6):
                decoder.again(ids)
                with decoder.decoding():
                    found.append(device.timed_ms(seen.where, partial(decoder.run, TOKENS)) / TOKENS)
            ms = median(found[1:])
        gbps = weights / ms / 1e6
        seen.note(line | {"ms": round(ms, 4), "gbps": round(gbps), "share": round(gbps / seen.read_gbps, 3)})
        torch.cuda.empty_cache()


@contextmanager
def late_launches() -> Iterator[None]:
    """No launch starts before the one before has ended."""
    with mock.patch.object(lean, "_hopper", lambda index: False):
        yield


def lines_of(path: Path) -> list[Line]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


class Share:
    """Of several processes one, which compiles its share of the cuts that have no line, for whoever times them all."""

    def __init__(self, path: Path, number: int, workers: int) -> None:
        self.lines, self.number, self.workers, self.asked = lines_of(path), number, workers, 0

    def add(self, tried: Line, nbytes: float, launch: Callable[[], None]) -> None:
        if any(tried.items() <= line.items() for line in self.lines):
            return
        self.asked += 1
        if self.asked % self.workers == self.number:
            with suppress(Exception):  # its line will say why it does not run
                launch()


def compile_in(workers: int, arguments: list[str]) -> None:
    """Shares the compiling of all cuts: Triton takes seconds for each, and keeps what it has compiled."""
    script = [sys.executable, str(Path(__file__).resolve()), *arguments]
    own = [subprocess.Popen([*script, "--share", f"{number}/{workers}"]) for number in range(workers)]
    for process in own:
        process.wait()


class Notes:
    """The lines that there are, and where new ones go."""

    def __init__(self, path: Path, seconds: float, where: str = "cuda") -> None:
        self.path, self.ends, self.where = path, time.monotonic() + seconds, where
        self.lines = lines_of(path)
        found = next((line["read_gbps"] for line in self.lines if "read_gbps" in line), None)
        if found is None:
            found = calibration.calibrate(where)["read_gbps"]
            self.note({"read_gbps": found})
        self.read_gbps = found

    def has(self, tried: Line) -> bool:
        return any(tried.items() <= line.items() for line in self.lines) or time.monotonic() > self.ends

    def add(self, tried: Line, nbytes: float, launch: Callable[[], None]) -> None:
        if not self.has(tried):
            self.note(measure(tried, nbytes, launch, self.read_gbps, self.where))

    def note(self, line: Line) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def best(self) -> dict[tuple[int, int, int, config.Neighbours], LeanCut]:
        """The fastest cut of each shape, by what stands beside."""
        found: dict[tuple[int, int, int, config.Neighbours], Line] = {}
        for line in self.lines:
            if line.get("part") in PRODUCTS and "us" in line:
                key = config.power_of_2(line["tokens"]), line["inputs"], line["outputs"], line["experts"]
                found[key] = min(found.get(key, line), line, key=lambda one: one["us"])
        fields = ("rows", "block", "warps", "stages", "front_rows", "tiles")
        return {key: LeanCut(*(line[field] for field in fields)) for key, line in found.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("parts", help=f"of {', '.join(PRODUCTS)}, attend, step, best; with commas")
    parser.add_argument("--arms", help=f"products: of the first (base_lean); step: {STEP_ARMS}")
    parser.add_argument("--out", type=Path, default=Path("results/runs/tune_lean.jsonl"))
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    parts = given.parts.split(",")
    if unknown := set(parts) - {*PRODUCTS, "attend", "step", "best"}:
        print(f"error: there is no part {', '.join(sorted(unknown))}: see --help", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: launches are timed on a CUDA device, and this machine has none", file=sys.stderr)
        return 2
    single = {*PRODUCTS, "attend"} & set(parts)
    if given.share is not None:
        number, workers = map(int, given.share.split("/"))
        with torch.no_grad():
            own = composed(given.model, given.batch, 1, given.arms or "base_lean")
            sweep(own, parts, Share(given.out, number, workers))
        return 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if single and given.workers > 1:
        compile_in(given.workers, arguments)
    seen = Notes(given.out, given.seconds)
    with torch.no_grad():
        if single:
            sweep(composed(given.model, given.batch, BLOCKS, given.arms or "base_lean"), parts, seen)
        if "step" in parts:
            steps(composed(given.model, given.batch, None, given.arms or STEP_ARMS), seen)
    if "best" in parts:
        for key, cut in sorted(seen.best().items()):
            print(f"    {key}: {cut},")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
