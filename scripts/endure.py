"""Does decoding long move anything? python scripts/endure.py tiny adafuse_switch_graph,adafuse_gather_lean

In: a backbone of conf/model (random weights; --set changes its shape), arms. Out: a line of JSON for each arm in --out:
tokens, those that a whole unmerged forward finds otherwise, weights that are not what they were, and how much memory
grew on host and device. An arm that has its tokens is not run again, and a cut one goes on; nothing new begins after
--seconds. Exit status 1 if any token or weight is wrong, or memory grows. What a step costs is no matter here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter
from adafuse.bench import workload
from adafuse.compose import composed
from adafuse.config import Config
from adafuse.engine.decode import forward_logits, installed
from adafuse.engine.decoders import Decoder
from adafuse.engine.make import make
from adafuse.model import backbone

PROMPT, TOKENS, SEQUENCES = 16, 200, 20
# of two logits no further apart either may be the largest: roundings of another order of the same sums
MARGIN = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
# what allocators keep after their first round
GROWTH_GIB = 0.25

Line = dict[str, Any]


def endure(settings: Config, name: str, tokens: int, ends: float, line: Line) -> Line:
    """Decode until there are so many tokens, or the time is over; each round is held against a whole forward."""
    model = backbone.load(settings)[0].eval()
    own, before = settings.arms.table[name], [p.detach().clone() for p in model.parameters()]
    method = settings.methods[own.method]
    adapter = workload.adapter_of(settings, model, method) if method.has_experts else None
    if adapter is not None:
        adapter.to_dtype(next(model.parameters()).dtype)
    decoder = make(model, adapter, own.strategy, own.runtime, PROMPT + TOKENS)
    first = None
    while line["tokens"] < tokens and time.monotonic() < ends:
        sequences = decoded(decoder, model, seed=line["tokens"])
        line["different"] += different(model, adapter, sequences)
        line["moved"] += sum(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        line["tokens"] += SEQUENCES * TOKENS
        now = memory_gib(model)
        first = first or now
        line["grown_gib"] = [round(b - a, 3) for a, b in zip(first, now, strict=True)]
        print(json.dumps(line), flush=True)
    return line


@torch.no_grad()
def decoded(decoder: Decoder, model: nn.Module, seed: int) -> Tensor:
    """[SEQUENCES, PROMPT + TOKENS]: prompts, and what the arm goes on with."""
    generator, found = torch.Generator().manual_seed(seed), []
    with decoder.installed():
        for _ in range(SEQUENCES):
            ids_1S = torch.randint(4, model.config.vocab_size, (1, PROMPT), generator=generator).to(
                model.device
            )
            next_11 = decoder.start(ids_1S).argmax(-1, keepdim=True)
            with decoder.decoding():
                found.append(torch.cat([ids_1S, next_11, decoder.run(TOKENS - 1)], dim=1))
    return torch.cat(found)


def different(model: nn.Module, adapter: Adapter | None, sequences_BS: Tensor) -> int:
    """Tokens that are not the likeliest by a whole forward of every sequence, experts beside the weights."""
    wrong = 0
    with installed(adapter, None):
        for ids_1S in sequences_BS.split(1):
            logits_SV = forward_logits(model, ids_1S)[0, PROMPT - 1 : -1]
            chosen_S = logits_SV.gather(1, ids_1S[0, PROMPT:, None]).squeeze(1)
            wrong += int((logits_SV.max(-1).values - chosen_S > MARGIN[logits_SV.dtype]).sum())
    return wrong


def memory_gib(model: nn.Module) -> tuple[float, float]:
    """(host, device)"""
    there = torch.cuda.memory_allocated() if model.device.type == "cuda" else 0
    return psutil.Process().memory_info().rss / 2**30, there / 2**30


def is_sound(line: Line) -> bool:
    return not (line["different"] or line["moved"]) and max(line["grown_gib"]) < GROWTH_GIB


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("arms", help="of conf/arms, with commas; strategies that write weights, and others")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="as the command line has it"
    )
    parser.add_argument("--out", type=Path, default=Path("results/runs/endure.json"))
    parser.add_argument("--seconds", type=float, default=500.0)
    given = parser.parse_args(arguments)
    ends, overrides = (
        time.monotonic() + given.seconds,
        ["profile=gpu", "task=latency", f"model={given.model}"],
    )
    try:
        settings = composed([*overrides, "model.weights=random", f"arms.run=[{given.arms}]", *given.set])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines: dict[str, Line] = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in settings.arms.run:
        key = " ".join([given.model, name, *given.set])
        line = lines.get(key) or {
            "arm": key,
            "tokens": 0,
            "different": 0,
            "moved": 0,
            "grown_gib": [0.0, 0.0],
        }
        lines[key] = endure(settings, name, given.tokens, ends, line)
        given.out.write_text(json.dumps(lines, indent=1))
    return 0 if all(map(is_sound, lines.values())) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
