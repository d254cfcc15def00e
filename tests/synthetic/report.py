"""Made-up records for the report's tests, with numbers that are known; conftest.py hands out `made`."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adafuse.records import SEAL, Record, read

GPU = {
    "name": "h200",
    "cpu": "Xeon",
    "cores": 16,
    "memory_gib": 125.9,
    "gpu": "NVIDIA H200",
    "driver": "580.1",
}
CPU = {"name": "cpu", "cpu": "EPYC", "cores": 2, "memory_gib": 23.5, "gpu": None}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROUTING = {
    "base": "none",
    "lora": "none",
    "mola": "layerwise",
    "adafuse_layerwise": "layerwise",
    "adafuse": "token",
}
# arm: label, method, strategy, runtime
ARMS = {
    "base": ("Backbone", "base", "dense", "eager"),
    "base_again": ("Backbone (again)", "base", "dense", "eager"),
    "mola_loop": ("MoLA", "mola", "loop", "eager"),
    "adafuse_loop": ("AdaFuse (loop)", "adafuse", "loop", "eager"),
    "adafuse_switch": ("AdaFuse (switch)", "adafuse", "switch", "eager"),
    "base_graph": ("Backbone (graph)", "base", "dense", "graph"),
    "base_graph_again": ("Backbone (graph, again)", "base", "dense", "graph"),
    "base_gemv_graph": ("Backbone (own GEMV, graph)", "base", "fused", "graph"),
    "adafuse_layerwise_gather_graph": ("AdaFuse, a gate per layer", "adafuse_layerwise", "gather", "graph"),
    "adafuse_gather_graph": ("AdaFuse (gather, graph)", "adafuse", "gather", "graph"),
    "adafuse_switch_graph": ("AdaFuse (switch, graph)", "adafuse", "switch", "graph"),
    "adafuse_fused_graph": ("AdaFuse (fused, graph)", "adafuse", "fused", "graph"),
}

Made = Callable[..., Record]


def settings(
    arms: Iterable[str] = ("base", "base_again", "adafuse_switch"), **changes: Any
) -> dict[str, Any]:
    """A configuration as a record holds it; `changes` replace whole entries."""
    words = ("label", "method", "strategy", "runtime")
    table = {name: dict(zip(words, own, strict=True)) for name, own in ARMS.items()}
    return {
        "model": {"name": "tiny", "path": None, "dtype": "bfloat16", "shape": {"hidden_size": 64}},
        "experts": {"targets": LINEARS, "rank": 16, "count": 8, "top_k": 2},
        "method": {"name": "adafuse"},
        "methods": {name: {"name": name, "routing": routing} for name, routing in ROUTING.items()},
        "arms": {"name": "paper", "table": table, "run": list(arms)},
        "data": {"name": "mixture", "families": ["copy", "sort"], "path": None},
        "suite": {"name": "families", "tasks": ["copy", "sort"]},
        "latency": {"rounds": 3, "block_tokens": 64},
        "layer": {"ranks": [16], "sequence_lengths": [1]},
        "batch": 1,
        "context": 64,
    } | changes


def maker(folder: Path) -> Made:
    """A factory of records in a folder: `made("0123456789ab", "latency", [line, ...], arms=[...])`, read back."""

    def make(
        key: str,
        task: str = "latency",
        lines: Iterable[dict[str, Any]] = (),
        status: str = "ok",
        header: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Record:
        run = {
            **{"kind": "run", "schema": 1, "task": task, "cell_id": "tiny", "config_hash": key},
            **{"experiment": "table1", "profile": "gpu", "commit": "0123456789abcdef", "dirty": False},
            **{
                "seed": 0,
                "replicate": 0,
                "versions": {"torch": "2.11.0", "python": "3.12.3"},
                "machine": GPU,
            },
            **{"command": f"python scripts/run.py experiment=table1 profile=gpu task={task} replicate=0"},
            **{"config": settings(**changes)},
            **(header or {}),
        }
        text = "".join(json.dumps(line) + "\n" for line in [run, *lines]).encode()
        path = folder / task / f"tiny-{key}.jsonl"
        path.parent.mkdir(exist_ok=True)
        if status == "unfinished":
            path = path.with_suffix(".jsonl.partial")
        else:
            end = {"kind": "end", "status": status, "seconds": 1.5, "peak_rss_gib": 0.5}
            text += json.dumps(end).encode()[:-1]
            text += SEAL + hashlib.sha256(text).hexdigest().encode() + b'"}\n'
        path.write_bytes(text)
        return read(path)

    return make


def edited(record: Record, change: Callable[[dict[str, Any]], None]) -> Record:
    """The record with each of its lines as `change` leaves it; it is not sealed anew."""
    lines = [json.loads(line) for line in record.data.splitlines()]
    for line in lines:
        change(line)
    record.run, record.data = lines[0], b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return record
