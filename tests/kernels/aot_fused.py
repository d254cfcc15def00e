"""Compiles fused.py's kernels for two GPU generations where there is no GPU: `python tests/kernels/aot_fused.py`.

Prints one line a kernel; ends with 1 if a kernel does not read W, A and B in 128-bit pieces, or spills registers.
"""

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adafuse.kernels import fused
from adafuse.kernels.config import fit_gemv, gemv_config

Case = tuple[str, Any, dict[str, str], dict[str, Any], int]
POINTERS = {"p_index": "*i64", "p_gate": "*fp32", "p_h": "*fp32", "p_flags": "*i32"}
UNALIGNED = {*fused.UNSPECIALISED, *fused.UNALIGNED}


def case(kernel: Any, tokens: int, in_features: int, rank: int = 0, top_k: int = 2) -> Case:
    """Name, kernel, signature, constants and warps of one launch in bf16 with the configuration used for its sizes."""
    cut = fit_gemv(gemv_config(tokens, experts=rank > 0), in_features, [4096])
    constants = {"p_bias": None, "T": tokens, **fused.constants(cut, in_features)}
    num_warps = constants.pop("num_warps")
    if rank:
        constants |= {"K": top_k, "R": rank}
    kinds = {"scaling": "fp32"} | dict.fromkeys(constants, "constexpr") | POINTERS
    signature = {
        name: kinds.get(name, "*bf16" if name.startswith("p_") else "i32") for name in kernel.arg_names
    }
    return f"{kernel.__name__} T={tokens} I={in_features} R={rank}", kernel, signature, constants, num_warps


AOT = [
    *(case(fused.linear_kernel, tokens, width) for tokens, width in [(1, 4096), (1, 11008), (2, 4096)]),
    *(case(fused.fused_kernel, 1, 4096, rank) for rank in [16, 64, 128]),
    *(case(fused.fused_kernel, tokens, width, 16) for tokens, width in [(1, 11008), (2, 4096)]),
]


def compile_one(arch: int, case: Case) -> bool:
    """Whether the kernel compiles for this architecture to 128-bit loads without spills."""
    name, kernel, signature, constants, num_warps = case
    # what the launcher tells Triton of aligned pointers and sizes
    hints = {
        (position,): [["tt.divisibility", 16]]
        for position, arg in enumerate(kernel.arg_names)
        if signature[arg] not in ("constexpr", "fp32") and arg not in UNALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    wide = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
    narrow = len(re.findall(r"ld\.global\S*\.b16", ptx))
    spills = ".local" in ptx
    print(f"sm_{arch} {name}: {wide} loads of 128 bits, {narrow} of 16, {compiled.metadata.shared} B shared")
    # a tile of B with fewer numbers than the program has threads is one load of 16 bits a thread
    return wide > 0 and narrow <= constants["TILES"] and not spills


if __name__ == "__main__":
    good = [compile_one(arch, case) for arch in (80, 90) for case in AOT]
    sys.exit(0 if all(good) else 1)
