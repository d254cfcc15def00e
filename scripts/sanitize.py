"""Every kernel under NVIDIA's compute-sanitizer: python scripts/sanitize.py [memcheck racecheck synccheck initcheck]

In: the GPU tests of the kernels, file by file. Out: a line of JSON for each tool and file in --out, how many errors it
found in our kernels and where; what has a line is not run again, and nothing new begins after --seconds. Exit 1 if a
line has errors, or a test failed. Needs a GPU and compute-sanitizer (CUDA's toolkit).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FILES = ("lean", "lean_ends", "gather", "fused", "switch", "route", "gates", "stream")
# of what initcheck tells, memory that torch has written counts as written: it has to watch torch's kernels too
OURS = ["--kernel-name", "kernel_substring=_kernel"]
# what the tool says of a kernel, with the line of ours that it means
PLACE = re.compile(r"at (\w+_kernel)\+\w+ in (\w+\.py:\d+)")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: .*?\((\d+) errors?)")


def command(tool: str, name: str) -> list[str]:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    watched = [] if tool == "initcheck" else OURS
    return ["compute-sanitizer", "--tool", tool, *watched, *tests, f"tests/kernels/test_{name}.py"]


def run(tool: str, name: str, seconds: float) -> dict[str, Any]:
    """A line of one tool and one file of tests."""
    # an allocator that maps memory itself fails under the tool, and says so as if it were an error of ours
    own = {key: value for key, value in os.environ.items() if key != "PYTORCH_CUDA_ALLOC_CONF"}
    line: dict[str, Any] = {"tool": tool, "file": name}
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command(tool, name), cwd=ROOT, env=own, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return line | {"error": f"took more than {seconds:.0f} s"}
    said = done.stdout + done.stderr
    found = SUMMARY.search(said)
    if found is None:
        return line | {"error": said.strip().splitlines()[-1][:200] if said.strip() else "said nothing"}
    passed = re.search(r"(\d+) passed", said)
    places = Counter(f"{kernel} {where}" for kernel, where in PLACE.findall(said))
    return line | {
        "errors": int(found.group(1) or found.group(2)),
        "places": dict(places.most_common(8)),
        "tests": int(passed.group(1)) if passed else 0,
        "failed": " failed" in said,
        "seconds": round(time.monotonic() - begun, 1),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", choices=[*TOOLS, []], help="all of them, if none is named")
    parser.add_argument("--files", default=",".join(FILES), help=f"of {', '.join(FILES)}; with commas")
    parser.add_argument("--out", type=Path, default=Path("results/runs/sanitize.jsonl"))
    parser.add_argument("--seconds", type=float, default=500.0)
    given = parser.parse_args(arguments)
    if shutil.which("compute-sanitizer") is None:
        print("error: there is no compute-sanitizer here: install CUDA's toolkit", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in given.out.read_text().splitlines()] if given.out.exists() else []
    ends = time.monotonic() + given.seconds
    wanted = [(tool, name) for tool in given.tools or TOOLS for name in given.files.split(",")]
    for tool, name in wanted:
        known = any((line["tool"], line["file"]) == (tool, name) and "errors" in line for line in lines)
        if known or time.monotonic() > ends:
            continue
        lines.append(run(tool, name, max(1.0, ends - time.monotonic())))
        with given.out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), flush=True)
    done = {(line["tool"], line["file"]): line for line in lines if "errors" in line}
    left = [f"{tool} {name}" for tool, name in wanted if (tool, name) not in done]
    bad = [line for line in done.values() if line["errors"] or line["failed"] or not line["tests"]]
    print(
        f"{len(done) - len(bad)} clean, {len(bad)} with errors, {len(left)} not run: {', '.join(left) or '-'}"
    )
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
