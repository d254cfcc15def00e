"""Training steps of one method's adapter, beside PEFT's LoRA of equal parameters, in interleaved rounds of one process.

In: a `Config` (`method`; `train` without its schedule: `steps` make a block; rounds and check_tokens of `latency`), the
backbone, a record. Out: check lines, blocks, and per arm a `fit_speed` line: tokens/s, share of the measured matrix
rate, ratio to PEFT's LoRA, peak GiB. One adapter is in the model at a time, every block is checkpointed. An arm whose
first loss or gradient is another without checkpointing is not timed; one that does not fit says so. An experiment has
a process for each method: what a cut run has finished stays.

FLOP a token (`FORMULA`), those of recomputation counted, those of norms, softmax and the optimiser not: 6 B for the
frozen weights of blocks, which run forward twice and once backward, for their input alone; 4 V for the head, which is
not recomputed; 8 A for the adapter's own parameters, forward twice, backward for input and weight; 8 L S H for causal
attention: two products of S/2 positions in L blocks of width H, forward twice, backward for both operands.
Next: calibration.py, rounds.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from statistics import median

import torch
from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.geometry import trainable_parameters
from adafuse.adapters.router import routing_losses
from adafuse.bench import calibration
from adafuse.bench.checks import Check
from adafuse.bench.left_out import say_dropped, say_set_aside
from adafuse.bench.memory import GIB, does_not_fit
from adafuse.bench.rounds import Block, Flag, TimedArm, run_rounds
from adafuse.config import Config, Method
from adafuse.engine.peft import trainable
from adafuse.model.llama import blocks_of
from adafuse.records import Recorder
from adafuse.stats import paired_ratio

PEFT = "peft_lora"
FORMULA = "6 B + 4 V + 8 A + 8 L S H: frozen weights of blocks, head, adapter, causal attention; recomputation counted"
# PEFT's rank is a multiple of it: of another number tensor cores make poor use
RANK_STEP = 8
# of roundings, between two orders of the same arithmetic
SAFETY = 8.0
# as transformers.Trainer has it
MAX_NORM = 1.0


@dataclass
class Arm:
    """Something to train: how it comes into the model, its parameters, the routers that have a loss of their own."""

    installed: Callable[[], AbstractContextManager[None]]
    parameters: list[nn.Parameter]
    adapter: Adapter | None = None
    peak_gib: float | None = None


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Check and time both arms; `where` is the device."""
    weights_dtype = next(model.parameters()).dtype
    matrix = calibration.matrix_tflops(where, weights_dtype)
    record.write("calibration", **calibration.calibrate(where), matrix_tflops=matrix)
    shape = config.train.batch, config.train.max_length
    generator = torch.Generator().manual_seed(config.seed)
    ids_BS = torch.randint(4, model.config.vocab_size, shape, generator=generator).to(where)
    seed = config.seed + 1000 * config.replicate
    backbone_bytes = sum(p.nbytes for p in model.parameters())
    arms: dict[str, Arm] = {}
    ready: dict[str, TimedArm] = {}
    model.train()
    try:
        for name, make in {PEFT: _peft, config.method.name: _ours}.items():
            # what the arm before keeps has no part in this one's peak
            others = _allocated(where) - backbone_bytes
            try:
                arm = make(config, model)
                checks = check(config, model, arm, ids_BS[:1, : config.latency.check_tokens])
                for one in checks:
                    record.write("check", arm=name, **asdict(one))
                say_dropped(name, checks)
                if all(one.passed for one in checks):
                    ready[name] = timed(config, model, arm, ids_BS, others)
                    arms[name] = arm
            except (torch.cuda.OutOfMemoryError, MemoryError) as error:
                record.fail(f"arm {name}", does_not_fit(name, model, where, error))
            except Exception as error:  # an arm's failure is a record; the other goes on
                record.fail(f"arm {name}", error)
            _give_back(where)
        blocks, flags = run_rounds(
            ready, config.latency.rounds, config.train.steps * ids_BS.numel(), seed, where, record
        )
    finally:
        model.eval()
    if not say_set_aside(blocks, flags):
        record.fail("fit_speed", ValueError("nothing of this cell counts: see its checks, errors and blocks"))
    ms = _counted(blocks, flags)
    for name in ms:
        flops = flops_per_token(model, arms[name].parameters, config.train.max_length)
        record.write("fit_speed", **_line(name, arms[name], ms, blocks[0].tokens, flops, matrix))


def flops_per_token(model: nn.Module, parameters: list[nn.Parameter], length: int) -> int:
    """Of a step on sequences of `length` with every block checkpointed, by `FORMULA`; nothing may be installed."""
    blocks, config = blocks_of(model), model.config
    frozen = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    head, own = model.get_output_embeddings().weight.numel(), sum(p.numel() for p in parameters)
    return 6 * frozen + 4 * head + 8 * own + 8 * len(blocks) * length * config.hidden_size


def check(config: Config, model: nn.Module, arm: Arm, ids_BS: Tensor) -> list[Check]:
    """The loss and the norm of the gradient of a first step with checkpointing, against those of a step without."""
    measured = {}
    for checkpointed in (False, True):
        with arm.installed(), _checkpointing(model, checkpointed):
            # the same dropout
            torch.manual_seed(config.seed)
            loss = _backward(config, model, arm, ids_BS)
            norm = torch.nn.utils.get_total_norm([p.grad for p in arm.parameters if p.grad is not None])
            measured[checkpointed] = float(loss), float(norm)
            _forget(arm)
    bound = SAFETY * torch.finfo(torch.bfloat16 if _is_half(config, model) else torch.float32).eps
    found = []
    for name, plain, own in zip(("loss", "gradient_norm"), measured[False], measured[True], strict=True):
        value = abs(own / plain - 1) if plain and isfinite(own) and isfinite(plain) else inf
        detail = f"relative: {own:.6g} with checkpointing, {plain:.6g} without"
        found.append(Check(name, value, bound, value <= bound, detail))
    return found


def timed(config: Config, model: nn.Module, arm: Arm, ids_BS: Tensor, others: int) -> TimedArm:
    """Steps of AdamW to be timed, after two that set up its state and measure the peak, less `others` bytes."""
    where, knobs = ids_BS.device.type, config.train
    optimiser = torch.optim.AdamW(
        arm.parameters, lr=knobs.learning_rate, weight_decay=knobs.weight_decay, fused=where == "cuda"
    )

    def step() -> None:
        _backward(config, model, arm, ids_BS)
        nn.utils.clip_grad_norm_(arm.parameters, MAX_NORM)
        optimiser.step()
        optimiser.zero_grad()

    def steps() -> None:
        for _ in range(knobs.steps):
            step()

    @contextmanager
    def entered(number: int) -> Iterator[Callable[[], object]]:
        with arm.installed(), _checkpointing(model, True):
            try:
                step()
                yield steps
            finally:
                _forget(arm)

    with entered(0):
        if where == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            arm.peak_gib = (torch.cuda.max_memory_allocated() - others) / GIB
    return entered


def _ours(config: Config, model: nn.Module) -> Arm:
    adapter = _adapter(config, model, config.method)
    return Arm(adapter.installing, adapter.trained(), adapter)


def _peft(config: Config, model: nn.Module) -> Arm:
    """PEFT's LoRA on the cell's linears, of the rank at which it has as many parameters as the method."""
    shape, lora = model.config.to_dict(), replace(config.methods["lora"], rank=RANK_STEP)
    wanted = trainable_parameters(config.method, config.experts, shape)
    times = max(1, round(wanted / trainable_parameters(lora, config.experts, shape)))
    sized = replace(lora, rank=times * RANK_STEP, alpha=2 * times * RANK_STEP)
    return Arm(*trainable(model, _adapter(config, model, sized)))


def _adapter(config: Config, model: nn.Module, method: Method) -> Adapter:
    adapter = Adapter(model, method, config.experts, config.seed)
    randomise(adapter, config.seed)
    return adapter


def _backward(config: Config, model: nn.Module, arm: Arm, ids_BS: Tensor) -> Tensor:
    """One forward and backward as the trainer has them: what is trained is in fp32, under autocast if not all is."""
    with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=_is_half(config, model)):
        if arm.adapter is None:
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        else:
            with arm.adapter.collecting() as said:
                loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
            balance, used = routing_losses(
                [gates for _, gates in said], torch.ones_like(ids_BS).bool().flatten()
            )
            method = arm.adapter.method
            loss = loss + method.balance_coefficient * balance + method.bypass_penalty * used
    loss.backward()
    return loss.detach()


def _is_half(config: Config, model: nn.Module) -> bool:
    return config.train.bf16 or next(model.parameters()).dtype != torch.float32


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def _forget(arm: Arm) -> None:
    for parameter in arm.parameters:
        parameter.grad = None


def _allocated(where: str) -> int:
    return torch.cuda.memory_allocated() if where == "cuda" else 0


def _give_back(where: str) -> None:
    gc.collect()
    if where == "cuda":
        torch.cuda.empty_cache()


def _counted(blocks: list[Block], flags: list[Flag]) -> dict[str, dict[int, float]]:
    """Milliseconds of each block that counts, by arm and round."""
    flagged = {(flag.arm, flag.round) for flag in flags}
    found: dict[str, dict[int, float]] = {}
    for block in blocks:
        if block.excluded is None and (block.arm, block.round) not in flagged:
            found.setdefault(block.arm, {})[block.round] = block.block_ms
    return found


def _line(
    name: str,
    arm: Arm,
    ms: Mapping[str, Mapping[int, float]],
    tokens: int,
    flops: int,
    matrix_tflops: float,
) -> dict[str, object]:
    """All fields of an arm's line; the ratio is of tokens/s, PEFT's time over the arm's, paired by round."""
    both = sorted(ms[name].keys() & ms.get(PEFT, {}).keys())
    ratio = paired_ratio([([ms[PEFT][r] for r in both], [ms[name][r] for r in both])]) if both else None
    tokens_per_s = tokens / median(ms[name].values()) * 1e3
    return {
        "arm": name,
        "parameters": sum(p.numel() for p in arm.parameters),
        "tokens_per_s": tokens_per_s,
        "flops_per_token": flops,
        "formula": FORMULA,
        "matrix_share": tokens_per_s * flops / (matrix_tflops * 1e12),
        "peak_gib": arm.peak_gib,
        "ratio": None if ratio is None else ratio.ratio,
        "low": None if ratio is None else ratio.low,
        "high": None if ratio is None else ratio.high,
        "rounds": len(both),
    }
