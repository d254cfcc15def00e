"""One token as a file that chrome://tracing and Perfetto open: what the host did, and what was launched.

In: a `Token`. Out: a gzipped Chrome trace, and its SHA-256. Written anew rather than copied from the profiler, whose
own file names the host, the process and its folders; times count from the first event. Next: report/traces.py.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from adafuse import identity
from adafuse.bench.trace_parts import Token

HOST, LAUNCHES = 0, 1
LANES = {HOST: "host", LAUNCHES: "launches"}


def write(token: Token, path: Path) -> str:
    """Write `path`; the same token gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begin_us = min([token.begin_us, *(event["ts"] for event in token.host)])
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": lane, "tid": 0, "args": {"name": name}}
        for lane, name in LANES.items()
    ]
    rows += [
        _row(HOST, event["cat"], event["name"], event["ts"] - begin_us, event["dur"]) for event in token.host
    ]
    rows += [
        _row(LAUNCHES, launch.part, launch.name, launch.start_us - begin_us, launch.length_us)
        for launch in token.launches
    ]
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": rows}, separators=(",", ":"))
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(text.encode())
    return identity.file_hash(path)


def _row(lane: int, category: str, name: str, start_us: float, length_us: float) -> dict[str, Any]:
    times = {"ts": round(start_us, 3), "dur": round(length_us, 3)}
    return {"ph": "X", "cat": category, "name": name, "pid": lane, "tid": 0, **times}
