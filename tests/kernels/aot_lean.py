"""Compiles the launches of a lean step where there is no GPU: `python tests/kernels/aot_lean.py [all]`.

Shapes of Llama-2-7B, Mistral-7B and Qwen2.5-7B, as their launches are cut. Prints one line a launch; ends with 1 if
one does not read W in 128-bit pieces, spills registers, lacks the wait of a dependent launch where there is one, has
several threads read the same of what others are writing, or lets what is read behind a flag pass it.
"""

import math
import re
import sys
from dataclasses import replace
from itertools import pairwise, product
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adafuse.kernels import attend, beside, ends, lean
from adafuse.kernels.config import attend_cut

META = {"device": "meta"}
BF16, FP32 = torch.bfloat16, torch.float32
TYPES = {BF16: "*bf16", FP32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}


class Launches:
    """Stands in for a kernel, and notes what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.calls.append((self.kernel, arguments))


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, **META)


def launched(every: bool) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, arguments) of every launch looked at."""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    kernels = [(lean, "product_kernel"), (attend, "attend_kernel"), (ends, "next_kernel"), (ends, "decide_kernel"),
               (ends, "embed_kernel")]  # fmt: skip
    for module in (lean, attend, ends):
        mock.patch.object(module, "dependent", lambda device: {"PDL": True, "launch_pdl": True}).start()
    for module in (lean, attend):
        mock.patch.object(module, "_dot_type", lambda like: triton.language.bfloat16).start()
    stands = {name: Launches(getattr(module, name)) for module, name in kernels}
    for module, name in kernels:
        mock.patch.object(module, name, stands[name]).start()

    def note(title: str) -> None:
        for stand in stands.values():
            found.extend((title, *call) for call in stand.calls)
            stand.calls.clear()

    llama, qwen, ranks = (4096, 11008, 12288), (3584, 18944, 4608), ((0, False), (16, False), (64, True))
    cases = [(1, llama, 16, False), (1, llama, 8, False), (2, qwen, 64, True), (32, llama, 16, False)]
    if every:
        cases = [(tokens, *case) for tokens in (1, 2, 8, 32) for case in product((llama, qwen), ranks)]
        cases = [(tokens, shape, *rank) for tokens, shape, rank in cases]
    titled = ((case, title) for case in cases for title in products(case[0], *case[1], *case[2:]))
    for (tokens, _, rank, routed), title in titled:
        note(f"T={tokens} {title} R={rank}{' routed' * routed}")
    for title in others(*llama[:2]):
        note(title)
    for group, heads, window in ((1, 32, None), (4, 8, 4096)):
        attention(1, heads, group, window)
        note(f"attend group={group}")
    head()
    note("head")
    mock.patch.stopall()
    return found


def products(tokens: int, hidden: int, inner: int, joined: int, rank: int, routed: bool):
    """The four products of a block, launched one by one."""
    kv = (joined - hidden) // 2
    members = [
        [(0, hidden), (hidden, kv), (hidden + kv, kv)],
        [(0, hidden)],
        [(0, inner), (inner, inner)],
        [(0, hidden)],
    ]
    norm, sizes = (
        lean.Norm(meta(tokens, hidden // (4 if tokens < 3 else 16), dtype=FP32), 1e-5),
        ((hidden, joined), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)),
    )
    for (inputs, outputs), own in zip(sizes, members, strict=True):
        gated, residual = outputs == 2 * inner, outputs == hidden
        own_experts = beside_of(tokens, inputs, outputs, own, rank, routed) if rank else None
        work = lean.Product(
            meta(tokens, inputs),
            meta(outputs, inputs),
            norm=None if residual else norm,
            gated=gated,
            beside=own_experts,
        )
        if residual:
            slots = meta(tokens, -(-outputs // work.fitted().rows), dtype=FP32)
            work = replace(
                work,
                residual=lean.Residual(
                    meta(tokens, outputs, dtype=FP32), meta(outputs), meta(tokens, outputs), slots
                ),
            )
        else:
            work = replace(work, y_TO=meta(tokens, inner) if gated else meta(tokens, outputs, dtype=FP32))
        lean.product(work)
        yield f"{inputs}->{outputs}"


def others(hidden: int, inner: int):
    """MixLoRA, and fewer terms than threads in the fewest rows a program, or no power of two of them."""
    for tokens in (1, 64):
        mixture(tokens, hidden, inner, rank=16)
        yield f"T={tokens} mixture {hidden}->"
    for tokens, rank, top_k in ((1, 4, 1), (2, 1, 1), (1, 48, 3)):
        own = beside_of(tokens, inner, hidden, [(0, hidden)], rank, False, top_k)
        y = meta(tokens, hidden, dtype=FP32)
        lean.product(lean.Product(meta(tokens, inner), meta(hidden, inner), y_TO=y, beside=own))
        yield f"T={tokens} {inner}->{hidden} R={rank} K={top_k}"


def mixture(tokens: int, hidden: int, inner: int, rank: int) -> None:
    """MixLoRA's two launches of an MLP."""
    slots, norm = meta(tokens * 2, inner), lean.Norm(meta(tokens, 16, dtype=FP32), 1e-5)
    one = meta(tokens, 1, 2, dtype=torch.int64), meta(tokens, 1, 2, dtype=FP32)
    wide = beside_of(tokens, hidden, 2 * inner, [(0, inner), (inner, inner)], rank, True)
    wide = replace(wide, index=one[0], weight=one[1], slots=slots)
    x, y = meta(tokens, hidden), meta(tokens, inner)
    lean.product(lean.Product(x, meta(2 * inner, hidden), y_TO=y, norm=norm, gated=True, beside=wide))
    narrow = beside_of(tokens, inner, hidden, [(0, hidden)], rank, False)
    h = meta(*beside.scratch(tokens, 8 * rank, 1, rank, 2, True, slots=True), dtype=FP32)
    narrow = replace(narrow, slots=slots, h=h, ready=False)
    lean.product(lean.Product(y, meta(hidden, inner), y_TO=meta(tokens, hidden, dtype=FP32), beside=narrow))


def beside_of(
    tokens: int, inputs: int, outputs: int, members: Any, rank: int, routed: bool, top_k: int = 2
) -> beside.Beside:
    experts, groups = 8, len(members)
    rows = groups * experts * (rank + routed)
    h = meta(*beside.scratch(tokens, rows, groups, rank, top_k, not routed), dtype=FP32)
    chosen = (tokens, groups, top_k) if routed else (tokens, top_k)
    logits = h[:, groups * experts * rank :] if routed else None
    index, weight = meta(*chosen, dtype=torch.int64), meta(*chosen, dtype=FP32)
    flags = meta(128, dtype=torch.int32)
    return beside.Beside(
        meta(rows, inputs),
        meta(experts, outputs, rank),
        members,
        experts,
        rank,
        top_k,
        2.0,
        index,
        weight,
        h,
        flags,
        7,
        logits,
        ready=not routed,
    )


def attention(tokens: int, heads: int, group: int, window: int | None) -> None:
    cut, width, slots = attend_cut(tokens, heads, 8192), 128, 8192
    cache, table, norm = (
        meta(tokens, heads, slots, width),
        meta(slots, width // 2, dtype=FP32),
        meta(width) if group == 4 else None,
    )
    partial = attend.room(tokens, heads, group, width, cut, torch.device("meta"))
    counters = meta(1, dtype=torch.int64), meta(tokens, dtype=torch.int64)
    qkv = meta(tokens, (group + 2) * heads * width, dtype=FP32)
    attend.attend(
        attend.Attend(
            qkv,
            cache,
            cache,
            meta(tokens, heads * group * width),
            table,
            table,
            *counters,
            norm,
            norm,
            1e-6,
            0.1,
            window,
            partial,
            cut,
        )
    )


def head() -> None:
    words, tokens, hidden = 152064, 1, 3584
    norm = lean.Norm(meta(tokens, 64, dtype=FP32), 1e-5)
    lean.product(lean.Product(meta(tokens, hidden), meta(words, hidden), y_TO=meta(tokens, words), norm=norm))
    one, pieces = meta(1, dtype=torch.int64), ends.pieces_of(words)
    best, found = meta(tokens, pieces, dtype=FP32), meta(tokens, pieces, dtype=torch.int32)
    ends.choose_next(
        ends.Next(
            meta(tokens, words),
            one,
            meta(tokens, 256, dtype=torch.int64),
            one,
            one,
            meta(1, dtype=FP32),
            one,
            best,
            found,
            meta(1, dtype=torch.int32),
            meta(128, dtype=torch.int32),
        )
    )
    out = lean.Residual(
        meta(tokens, hidden, dtype=FP32), meta(hidden), meta(tokens, hidden), meta(tokens, 896, dtype=FP32)
    )
    ends.embed(one, meta(words, hidden), out)
    gates = meta(1, 2, dtype=torch.int64), meta(1, 2, dtype=FP32), meta(1, 8, dtype=FP32)
    ends.decide(ends.Decision(meta(1, hidden), norm, meta(9, hidden, dtype=FP32), *gates, False, True, None))
    ends.decide(
        ends.Decision(
            meta(1, hidden),
            norm,
            meta(8, hidden, dtype=FP32),
            *gates,
            False,
            False,
            1e-6,
            meta(512, 1, 2, dtype=torch.int64),
            meta(512, 1, dtype=torch.bool),
            one,
        )
    )


def compile_one(arch: int, name: str, kernel: Any, arguments: dict[str, Any]) -> bool:
    arguments = {key: value for key, value in arguments.items() if key != "launch_pdl"}
    options = {"num_warps": arguments.pop("num_warps"), "launch_pdl": arch >= 90}
    arguments["PDL"] = arch >= 90
    signature, constants, hints = {}, {}, {}
    for place, arg in enumerate(kernel.arg_names):
        value = arguments[arg]
        if isinstance(value, torch.Tensor):
            signature[arg] = TYPES[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        elif value is None or kernel.params[place].is_constexpr:
            signature[arg], constants[arg] = "constexpr", value
        else:
            signature[arg] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    wide = len(
        re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
    )
    narrow, local = len(re.findall(r"ld\.global\S*\.b16", ptx)), ".local" in ptx
    waits = "griddepcontrol.wait" in ptx or "PDL" not in kernel.arg_names
    loads = f"{wide} loads of 128 bits, {narrow} of 16"
    print(f"sm_{arch} {name}: {loads}, {compiled.metadata.shared} B shared{', SPILLS' * local}", flush=True)
    product, ordered = "->" in name, flags_come_first(ptx)
    # what routers chose is read behind a flag, and then no longer written
    tiles = arguments["TILES"] if arguments.get("CHOSEN") else 0
    alone = not tiles or each_by_one_thread(compiled.asm["ttgir"], 2 * tiles)
    print(
        "    READ BY SEVERAL THREADS\n" * (not alone) + "    READ BEFORE ITS FLAG\n" * (not ordered), end=""
    )
    return not local and alone and ordered and (waits or arch < 90) and (wide > 0 or not product)


def each_by_one_thread(ttgir: str, count: int) -> bool:
    """Whether there are so many volatile loads, of which the compiler has doubled none, and the layout of each has no
    more places along any dimension than there are elements.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?), order", ttgir, re.MULTILINE))
    loads = re.findall(r"isVolatile = true.*?tensor<((?:\d+x)+)!tt\.ptr<\w+>, (#\w+)>", ttgir)
    if len(loads) != count or ttgir.count("isVolatile = true") != count:
        return False
    for shape, layout in loads:
        spread = [map(int, each.split(",")) for each in re.findall(r"\[([\d, ]+)\]", layouts[layout])]
        places = [math.prod(along) for along in zip(*spread, strict=True)]
        if any(place > int(size) for place, size in zip(places, shape.split("x"), strict=False)):
            return False
    return True


def flags_come_first(ptx: str) -> bool:
    """Whether a barrier of all threads stands between a look at a flag and whatever is read next of what it is for."""
    look = r"ld\.global\.gpu\.(?:relaxed|acquire)|atom\.global\.gpu\.acq\w*"
    order = re.findall(look + r"|bar\.sync|ld\.global\.cg|ld\.volatile", ptx)
    return all(what == "bar.sync" for before, what in pairwise(order) if re.match(look, before))


if __name__ == "__main__":
    cases = launched(every="all" in sys.argv)
    # an older card has no dependent launches, and is otherwise the same
    good = [compile_one(90, *case) for case in cases] + [compile_one(80, *case) for case in cases[::4]]
    sys.exit(0 if all(good) else 1)
