"""What would the tests not notice? python scripts/mutate.py src/adafuse/stats.py tests/test_stats.py breaks and asks.

In: a module and the tests that judge each of its mutants, on a CPU, kernels in Triton's interpreter, in a fork of this
process, which has the libraries in memory. Out: a line for each, killed, timed out or survived, and .mutants.jsonl,
from which a second call goes on; it asks the survivors again. Exit status 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT, LIMIT_S = Path(__file__).resolve().parents[1], 180
LIBRARIES = ["triton", "transformers", "peft", "datasets", "lm_eval.evaluator", "hydra", "scipy.special"]
CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SWAPS = "Lt-LtE Gt-GtE Eq-NotEq Is-IsNot In-NotIn Mod-Mult FloorDiv-Mult Mult-Div Add-Sub BitAnd-BitOr And-Or"
PAIRS = [swap.split("-") for swap in SWAPS.split()]
OTHER = {getattr(ast, a): getattr(ast, b) for x, y in PAIRS for a, b in ((x, y), (y, x))}


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what became of what, the whole source) of each."""
    tree = ast.parse(source)
    for node in _nodes(tree):
        for change in _changes(node):
            own, before = vars(node).copy(), ast.unparse(node).splitlines()[0]
            vars(node).update(change)
            yield node.lineno, f"{before}  ->  {ast.unparse(node).splitlines()[0]}", ast.unparse(tree)
            vars(node).update(own)


def _nodes(tree: ast.AST) -> Iterator[Any]:
    for field, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and field not in ("annotation", "returns", "decorator_list"):
                yield from (node, *_nodes(node))


def _changes(node: Any) -> Iterator[dict[str, Any]]:
    """For each mutant of one node the fields that change."""
    one = ast.Constant(1)
    match node:
        case ast.Compare(ops=[op, *more]) if type(op) in OTHER:
            yield {"ops": [OTHER[type(op)](), *more]}
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            yield {"op": OTHER[type(op)]()}
        case ast.UnaryOp(op=op, operand=operand):
            yield {"operand": ast.UnaryOp(op, operand)}
        case ast.Constant(value=int() | float() as value):
            yield {"value": not value if isinstance(value, bool) else value + 1}
        case ast.If() | ast.IfExp():
            yield {"test": ast.Constant(True)}
        case ast.Slice(lower=lower, upper=upper) if lower or upper:
            yield {"lower": ast.BinOp(lower, ast.Add(), one) if lower else one}
            yield {"upper": ast.BinOp(upper, ast.Sub(), one) if upper else ast.Constant(-1)}
        case ast.Call(ast.Name("range") | ast.Attribute(attr="range" | "static_range"), [*less, end]):
            yield {"args": [*less, ast.BinOp(end, ast.Sub(), one)]}


def verdict(root: Path, module: str, mutated: str, tests: list[str]) -> str:
    """What `tests` say of a copy of src/ in `root`, in which its `module` reads `mutated`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(root / "src", f"{folder}/src")
        Path(folder, "conf").symlink_to(root / "conf")
        Path(folder, module).write_text(mutated)
        if not (child := os.fork()):
            signal.alarm(LIMIT_S)
            sys.path.insert(0, f"{folder}/src")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # what compiles for a GPU takes a minute, in a process of its own that sees no mutant
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", "not compile", *tests]))
        return {0: "survived", signal.SIGALRM: "timed out"}.get(os.waitpid(child, 0)[1], "killed")


def main() -> int:
    """Print a line for each mutant; returns the exit status."""
    parser, file = argparse.ArgumentParser(description=__doc__), ROOT / ".mutants.jsonl"
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--count", type=int, default=20, help="so many, the same ones at every call")
    parser.add_argument("--share", default="1/1", help="I/N: every N-th of them, from the I-th on")
    given, found = parser.parse_args(), []
    part, parts = map(int, given.share.split("/"))
    os.environ |= CPU
    list(map(__import__, LIBRARIES))
    source, module = (ROOT / given.module).read_text(), given.module
    if verdict(ROOT, module, source, given.tests) != "survived":
        sys.exit(f"error: the tests fail, or take more than {LIMIT_S} s, without any mutant")
    every = list(mutants(source))
    with file.open("a+", buffering=1) as out:
        out.seek(0)
        seen = {key: said for key, said, *_ in map(json.loads, out)}
        drawn = sorted(random.Random(0).sample(every, min(given.count, len(every))))
        for line, what, mutated in drawn[part - 1 :: parts]:
            key = sha256(mutated.encode()).hexdigest()
            if seen.get(key, "survived") == "survived":
                seen[key] = verdict(ROOT, module, mutated, given.tests)
                print(json.dumps([key, seen[key], module, line, what]), file=out)
            found.append(seen[key])
            print(f"{seen[key]:9}  {module}:{line}  {what}", flush=True)
    print(f"{module}, of {len(every)}:", *(f"{found.count(one)} {one}" for one in sorted(set(found))))
    return int("survived" in found)


if __name__ == "__main__":
    sys.exit(main())
