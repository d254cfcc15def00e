"""Compiles the launches of gather.py, route.py and gates.py for GPUs that need not be there.

In: nothing; run as a script with TRITON_INTERPRET unset. Tensors without storage go through the real launchers, so that
what is compiled is what would be launched. Out: a line for every kernel; exit code 1 when one has no 128-bit load,
or spills. test_gather_launches.py runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adafuse.kernels import gates, gather, route
from adafuse.kernels.config import FEW_TOKENS

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
WIDE = r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global [^;]*, 0x10,"
SIZES = [(90, tokens, rank) for tokens in (1, 32) for rank in (16, 64, 128)] + [(80, 1, 16), (80, 32, 64)]
MOST_STACK = 32  # bytes a thread: a few values outside the loops; a tile that does not fit takes hundreds
LAUNCHES: list[tuple[JITFunction, dict[str, Any]]] = []


def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of a launch."""
    LAUNCHES.append((self, dict(zip(self.arg_names, args, strict=False)) | options))


def compiled(kernel: JITFunction, arguments: dict[str, Any], arch: int) -> Any:
    """The kernel, specialised as the launcher of `triton` would."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def kind(value: object) -> str:
    """The type of an argument, as Triton writes it."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def registers(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its stack in bytes, which is where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def launch_all(tokens: int, rank: int, dtype: torch.dtype) -> None:
    """Every launcher once, at the shapes of a Llama-2-7B's gate and up projections, two of eight experts."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    inputs, outputs, members = 4096, 22016, [(0, 11008), (11008, 11008)]
    x, product = empty(tokens, inputs), empty(tokens, outputs + 2 * 8 * rank)
    y, u, lora_B = product[:, :outputs], product[:, outputs:], empty(8, outputs, rank)
    index, weight = empty(tokens, 1, 2, dtype=torch.int64), empty(tokens, 1, 2, dtype=torch.float32)
    gather.expand_all_(y, u, lora_B, index, weight, members, 2.0)
    # rows that are an odd multiple of 8 long: the logits of one router of 8 experts end them
    y, u, logits = empty(tokens, 4096 + 8 * rank + 8).tensor_split([4096, 4096 + 8 * rank], dim=1)
    gather.expand_routed_(y, u, logits, empty(8, 4096, rank), [(0, 4096)], 2, False, 2.0)
    if tokens <= FEW_TOKENS:
        index, weight, lora_A = index[:, 0], weight[:, 0], empty(8, 2 * rank, inputs)
        gather.expand_(y, gather.shrink(x, lora_A, index), lora_B, index, weight, members, 2.0)
    if rank == 16:
        route.route(x, empty(2, 8, inputs, dtype=torch.float32), 2, False)
        route.route(empty(tokens, 11008), empty(1, 8, 11008, dtype=torch.float32), 2, True)
        gates.thirds(empty(8, 4096, dtype=torch.float32), dtype)
        index, weight, probs, dense = gates.gates(empty(tokens, 72, dtype=torch.float32), 3, 2, False)
        gates.gates_backward(weight, None, None, (index, probs, dense), True, dtype)
        gates.gates_backward(None, probs, dense, (index, probs, dense), False, dtype)


def main() -> int:
    """Prints kernel, size, architecture, 128-bit loads and registers; the exit code."""
    JITFunction.run = record
    failures = 0
    for arch, tokens, rank in SIZES:
        LAUNCHES.clear()
        launch_all(tokens, rank, torch.bfloat16)
        for kernel, arguments in LAUNCHES:
            code = compiled(kernel, arguments, arch)
            wide = len(re.findall(WIDE, code.asm["ptx"]))
            used, stack = registers(code.asm["cubin"])
            # of a tile of gates a thread has two numbers
            narrow = kernel.fn.__name__.startswith("gates")
            failures += (wide == 0 and not narrow) or stack > MOST_STACK
            routed = " routed" if arguments.get("ROUTED") else ""
            print(
                f"{kernel.fn.__name__}{routed} T={tokens} r={rank} sm_{arch}: {wide} 128-bit loads, "
                f"{used} registers, {stack} bytes of stack, {code.metadata.shared} bytes shared"
            )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
