"""Compiles the switch kernel for two GPUs where there is none, and demands 128-bit loads: run by test_switch.py."""

import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adafuse.kernels import switch
from adafuse.kernels.config import SwitchConfig, switch_config, switch_stages

# what one program may have on an A100 and on an H200
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


def constexprs(
    rank: int, slots: int, held: int, config: SwitchConfig, shared_bytes: int
) -> dict[str, object]:
    """What `_launch` passes for bfloat16 weights whose rows begin at multiples of 32 bytes."""
    product = switch.contraction(rank, slots)
    return {
        "SOURCE": int(held > 0),
        "HELD": held,
        "ELEMENT": tl.bfloat16,
        "DOT": tl.bfloat16,
        **product,
        "ROW_STEP": 16,
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
        "STAGES": switch_stages(config, product["DEPTH"], 2, shared_bytes),
    }


# (rank, slots, gates held): switches with top-1 and top-2, and a rebase, which asks what the weights hold
CASES = [(rank, *merge) for rank in (8, 16, 64, 128) for merge in ((2, 0), (4, 0), (2, 2))]
# asynchronous reads, of W and B, and how many bytes each takes
ASYNC = re.compile(r"cp\.async\.\w+\.shared\.global\S* .*?, 0x([0-9a-f]+)")


def narrow_accesses(ptx: str, least_bytes: int) -> list[str]:
    """Reads and writes of W, A and B (the ones with a cache policy) below 128 bits, or (asynchronous) the least."""
    plain = [line for line in ptx.splitlines() if "cache_hint" in line and "cp.async" not in line]
    narrow = [line for line in plain if ".global" in line and ".v4.b32" not in line]
    return narrow + [found[0] for found in ASYNC.finditer(ptx) if int(found[1], 16) < least_bytes]


def compiled(rank: int, slots: int, held: int, arch: int) -> object:
    config = switch_config(torch.bfloat16.itemsize, rank)
    constants = constexprs(rank, slots, held, config, SHARED_BYTES[arch])
    signature = {
        "p_strips": "*i64",
        "p_index": "*i64",
        "p_gate": "*fp32",
        "p_held": "*fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(fn=switch.switch_kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": config.warps})


def main() -> None:
    for rank, slots, held in CASES:
        for arch, shared_bytes in SHARED_BYTES.items():
            binary, config = compiled(rank, slots, held, arch), switch_config(torch.bfloat16.itemsize, rank)
            ptx, shared = binary.asm["ptx"], binary.metadata.shared
            writes = ptx.count("st.global.L1::evict_first.L2::cache_hint.v4.b32")
            reads = [int(width, 16) for width in ASYNC.findall(ptx)]
            # of a small tile of B a thread has fewer than 16 bytes to read
            tile_B = 2 * config.block_o * switch.contraction(rank, slots)["DEPTH"]
            least = min(16, tile_B // (32 * config.warps))
            name = f"sm_{arch} rank {rank} slots {slots} held {held}"
            print(
                f"{name}: {writes} writes of W, {len(reads)} asynchronous reads, {shared} bytes of shared memory"
            )
            # W goes to the chip and back in accesses of 16 bytes
            assert reads.count(16) >= writes > 0, name
            assert not narrow_accesses(ptx, least), (name, narrow_accesses(ptx, least))
            assert shared <= shared_bytes, name


if __name__ == "__main__":
    main()
