"""Compiles the switch kernel for two GPUs where there is none, and demands 128-bit loads: run by test_switch.py."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adafuse.kernels import switch

# what one program may have on an A100 and on an H200
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


def constexprs(rank: int, slots: int, config: switch.Config) -> dict[str, object]:
    """What `_launch` passes for bfloat16 weights whose rows begin at multiples of 32 bytes."""
    return {
        "SOURCE": 0,
        "ELEMENT": tl.bfloat16,
        "DOT": tl.bfloat16,
        **switch.contraction(rank, slots),
        "ROW_STEP": 16,
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
    }


def case(rank: int, slots: int) -> tuple[object, dict[str, str], dict[str, object], dict[str, object]]:
    config = switch._config(torch.bfloat16, rank)
    constants = constexprs(rank, slots, config)
    signature = {
        "strips": "*i64",
        "index_S": "*i64",
        "gate_S": "*fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }
    return switch.switch_kernel, signature, constants, options


AOT = [case(rank, slots) for rank in (8, 16, 64, 128) for slots in (2, 4)]


def narrow_loads(ptx: str) -> list[str]:
    """Loads of W, A and B (the ones with a cache policy) that are not 128 bits wide, cp.async aside."""
    loads = [line for line in ptx.splitlines() if "ld.global" in line and "cache_hint" in line]
    return [line for line in loads if ".v4.b32" not in line]


def main() -> None:
    for kernel, signature, constants, options in AOT:
        for arch in (80, 90):
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
            policy = "global.L1::evict_first.L2::cache_hint.v4.b32"
            reads, writes = ptx.count(f"ld.{policy}"), ptx.count(f"st.{policy}")
            name = f"sm_{arch} rank {constants['RANK']} slots {constants['SLOTS']}"
            print(
                f"{name}: {reads} reads and {writes} writes of W, 128 bits each, {shared} bytes of shared memory"
            )
            # a tile is read in two places, ahead of the loop and in it, and written in one
            assert reads == 2 * writes > 0, name
            assert not narrow_loads(ptx), (name, narrow_loads(ptx))
            assert shared <= SHARED_BYTES[arch], name


if __name__ == "__main__":
    main()
