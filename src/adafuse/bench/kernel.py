"""Every kernel by itself: right on these operands, then timed against naive.py and against the bytes it must move.

In: a `Config` (shape and dtype of a backbone, experts.count and top_k, the knobs of `kernel`). Out: a `kernel` line per
case. `ms` is one pass over all blocks, what one decode step pays, in one CUDA graph; `floor_ms` is its bytes over the
bandwidth measured here: copy bandwidth for kernels that write the weights (switch, rebase), read bandwidth for the
others. Merges are timed on each of `kernel.targets`, the others with experts on all linears. A kernel whose result is
wrong has a line and no time. Next: kernel_work.py, which has a pass of each kernel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from adafuse.bench import calibration, device
from adafuse.bench.kernel_work import MERGES, WITH_EXPERTS, Case, Draw, Sizes, Work, build, sizes_of
from adafuse.config import Config, Kernel
from adafuse.kernels.config import FEW_TOKENS, FUSED_MAX_BATCH
from adafuse.records import Recorder

WARMUP_REPLAYS = 3
NAIVE_RUNS = 3
SAFETY = 8.0
# kernels that serve so many tokens and no more
MOST_TOKENS = {"shrink_expand": FEW_TOKENS, "fused": FUSED_MAX_BATCH, "linear": FUSED_MAX_BATCH}


@torch.no_grad()
def run(config: Config, where: str, record: Recorder) -> None:
    """Check and time all cases; `where` is the device. On a CPU the times mean nothing (Triton's interpreter)."""
    bandwidth = calibration.calibrate(where)
    record.write("calibration", **bandwidth)
    sizes = sizes_of(config)
    for case in tqdm(cases(config.kernel), desc="kernel cases", unit="case"):
        try:
            record.write("kernel", **_line(config, where, case, sizes, bandwidth))
        except Exception as error:  # a case's failure is a record; the other cases go on
            said = f"kernel {case.kernel} on {case.targets}, rank={case.rank}, tokens={case.tokens}"
            record.fail(said, error)
        if where == "cuda":
            torch.cuda.empty_cache()


def cases(knobs: Kernel) -> list[Case]:
    """Every combination that a kernel depends on; merges alone take `targets`, the others have experts everywhere."""
    found = []
    for name in knobs.kernels:
        ranks: list[int | None] = [*knobs.ranks] if name in (*MERGES, *WITH_EXPERTS) else [None]
        most = MOST_TOKENS.get(name, max(knobs.tokens))
        tokens: list[int | None] = [None] if name in MERGES else [t for t in knobs.tokens if t <= most]
        targets = knobs.targets if name in MERGES else ["all"]
        found += [Case(name, target, rank, t) for target in targets for rank in ranks for t in tokens]
    return found


def _line(
    config: Config, where: str, case: Case, sizes: Sizes, bandwidth: dict[str, float]
) -> dict[str, Any]:
    """All fields of one case; its operands are gone afterwards."""
    dtype = getattr(torch, config.model.dtype.name)
    work = build(case, Draw(sizes, where, dtype, torch.Generator(where).manual_seed(config.seed)))
    error, bound = _error(work), _bound(work, sizes)
    passed = error <= bound
    limit_gbps = bandwidth["copy_gbps" if work.copies else "read_gbps"]
    ms = pass_ms(where, work.run, config.kernel.replays) if passed else None
    gbps = None if ms is None else work.bytes / ms / 1e6
    return {
        **asdict(case),
        "model": config.model.name,
        "shape": work.shape,
        "dtype": config.model.dtype.name,
        "error": error,
        "bound": bound,
        "passed": passed,
        "ms": ms,
        "naive_ms": _naive_ms(where, work, sizes.blocks) if passed else None,
        "bytes": round(work.bytes),
        "floor_ms": work.bytes / limit_gbps / 1e6,
        "gbps": gbps,
        "share": None if gbps is None else gbps / limit_gbps,
    }


def _error(work: Work) -> float:
    """Largest difference from the reference over the reference's largest value; infinite if any is not finite."""
    worst = 0.0
    with _poisoned_memory():
        pairs = work.check()
    for got, wanted in pairs:
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        # max() would lose a NaN
        worst = max(worst, float(error) if bool(error.isfinite()) else math.inf)
    return worst


def _bound(work: Work, sizes: Sizes) -> float:
    """Two roundings to the dtype (a factor's product on its way to a tensor core, the result), and fp32 sums in another
    order, whose roundings grow as the root of their terms.
    """
    terms = max(inputs for _, inputs in sizes.linears.values())
    fp32 = math.sqrt(terms) * torch.finfo(torch.float32).eps
    return SAFETY * (math.sqrt(2) * torch.finfo(work.dtype).eps + fp32)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """What torch.empty gives holds NaN (integers: their largest value), so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # that cuBLAS would need a setting for it
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def pass_ms(where: str, work: Callable[[], object], replays: int) -> float:
    """Median milliseconds of a pass. Replays queue behind each other, so that the host's launch is not in the time."""
    if where != "cuda":
        return median(device.timed_ms(where, work) for _ in range(replays))
    replay = device.captured(work)
    for _ in range(WARMUP_REPLAYS):
        replay()
    return median(device.queued_ms(replay, replays))


def _naive_ms(where: str, work: Work, blocks: int) -> float | None:
    """Milliseconds of naive.py for a pass: one block timed, eagerly, times their number."""
    if work.naive is None:
        return None
    work.naive()
    return blocks * median(device.timed_ms(where, work.naive) for _ in range(NAIVE_RUNS))
