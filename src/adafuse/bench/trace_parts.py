"""Which part of a decode step every launch belongs to: said by the code while it runs, and found again in the trace.

In: the plain model's own modules and, while an arm is decoding, its adapter (or None); then the events of a Chrome
trace. Out: inside `scopes`, a record_function around whatever begins a part (the innermost wins: a frozen linear inside
the attention module is `base_gemm`); afterwards every attribute is the one that stood there before, so that a timed
path never carries one. Then `Token`s with their `Launch`es in order, each with its part. On a GPU a launch is a kernel,
copy or fill; the host's call that caused it (same correlation) lies in a scope, or in none. Behind a captured graph
there is no scope: its launches take the parts of the same step launched one by one, in order, if the names agree. On a
CPU a launch is an operator called from Python: what it calls itself is how it is done, not a launch.
Parts: `base_gemm` the frozen products, the head's too; `attention` the rest of the attention modules; `adapters` what
the experts add; `routing` the routers; `switch` what writes experts into weights; `other` norms, activations, argmax.
A kernel that does two things counts where its bytes are: the joined product of W with the experts' A behind it, and
strategy fused's and runtime lean's one kernel, are `base_gemm`; the expand that chooses its experts is `adapters`.
Next: trace.py.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar

from torch import nn
from torch.profiler import record_function

from adafuse.adapters.adapter import Adapter
from adafuse.model.llama import blocks_of
from adafuse.model.projections import Joint
from adafuse.strategies.joined import Extended

PARTS = ("base_gemm", "attention", "adapters", "routing", "switch", "other")
# what the profiler sees: a scope is PREFIX and its part, and a token begins at MARK
PREFIX, MARK = "adafuse part ", "adafuse token"
# a module and its part
PlainParts = list[tuple[nn.Module, str]]
# our operators say by themselves what they are
OPERATORS = {
    "adafuse::linear": "base_gemm",
    "adafuse::fused": "base_gemm",
    "adafuse::expand_behind_": "adapters",
    "adafuse::expand_routed_behind_": "adapters",
    "adafuse::add_all_": "adapters",
    "adafuse::add_chosen_": "adapters",
    "adafuse::route": "routing",
}
Event = dict[str, Any]
T = TypeVar("T")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
HOST = ("cpu_op", "user_annotation", *CALLS)
# Names of kernels, first match wins. A library's product of experts looks like one of the backbone: by name it is base.
NAMES = (
    ("switch", r"^switch_kernel"),
    ("routing", r"^(route|decide)_kernel"),
    ("adapters", r"^(shrink|expand|expand_all)_kernel"),
    ("attention", r"^attend_kernel|flash|fmha|attention|sdpa"),
    (
        "base_gemm",
        r"^(fused|linear|product)_kernel|gemm|gemv|cutlass|cublas|nvjet|splitk|dot_kernel|tem_fused\w*mm",
    ),
)


def plain_parts(model: nn.Module) -> PlainParts:
    """The modules of a plain backbone that are a part each: adapters wrap them, or put others in their place."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    attentions = [block.self_attn for block in blocks_of(model)]
    return [(module, "base_gemm") for module in linears] + [(module, "attention") for module in attentions]


@contextmanager
def scopes(model: nn.Module, plain: PlainParts, adapter: Adapter | None) -> Iterator[None]:
    """Scopes while inside; enter it after the decoder's own contexts, which put the modules in their places."""
    adapted = _adapted(adapter)
    with ExitStack() as stack:
        for module, part in plain:
            _scope(stack, module, "forward", part)
        # classes, because a joint's own product is bound when its strategy is prepared
        _scope(stack, Extended, "product", "base_gemm")
        _scope(stack, Joint, "output", lambda joint: _part_of(joint, adapted))
        if adapter is not None:
            _scope_adapter(stack, adapter)
        # PEFT's own modules, where an arm runs those
        for layer in [module for module in model.modules() if hasattr(module, "base_layer")]:
            _scope(stack, layer, "forward", "adapters")
            # merged when the gates are known, which is a verb of its strategy; taken out by its decoder
            _scope(stack, layer, "unmerge", "switch")
        yield


@contextmanager
def marks(model: nn.Module) -> Iterator[None]:
    """A mark wherever the model begins a forward; not a hook, because PEFT calls `forward` past it."""
    with ExitStack() as stack:
        _around(stack, model, "forward", _marked)
        yield


def mark() -> None:
    """Here a token begins."""
    with record_function(MARK):
        pass


def _marked(*arguments: Any) -> AbstractContextManager[None]:
    mark()
    return nullcontext()


def _scope_adapter(stack: ExitStack, adapter: Adapter) -> None:
    """The routers, and the strategy's verbs; merging ones write weights where others compute."""
    strategy = adapter.context.decode
    own = "switch" if strategy.merging else "adapters"
    _scope(stack, adapter.context, "route", "routing")
    for verb in ("decide", "linear", "mix", "add"):
        if hasattr(strategy, verb):
            _scope(stack, strategy, verb, own)


def _adapted(adapter: Adapter | None) -> set[str]:
    """Paths of the linears that compute with experts; merged ones are products of the backbone's own."""
    sites = {} if adapter is None or adapter.merging else adapter.sites
    return {path for path, site in sites.items() if getattr(site, "experts", None) is not None}


def _part_of(joint: Joint, adapted: set[str]) -> str:
    """A joined projection without experts is the product alone."""
    return "base_gemm" if adapted.isdisjoint(joint.projection.paths) else "adapters"


def _scope(stack: ExitStack, owner: Any, name: str, part: str | Callable[[Any], str]) -> None:
    """Put the scope around `owner.name` until `stack` closes; `part` may depend on the first argument."""

    def context(*args: Any) -> AbstractContextManager[Any]:
        return record_function(PREFIX + (part if isinstance(part, str) else part(args[0])))

    _around(stack, owner, name, context)


def _around(
    stack: ExitStack, owner: Any, name: str, context: Callable[..., AbstractContextManager[Any]]
) -> None:
    """Run `owner.name` within `context(*arguments)` until `stack` closes."""
    call, own = getattr(owner, name), name in vars(owner)

    @wraps(call)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with context(*args):
            return call(*args, **kwargs)

    def restore() -> None:
        if own:
            setattr(owner, name, call)
        else:
            delattr(owner, name)

    setattr(owner, name, inside)
    stack.callback(restore)


@dataclass(frozen=True)
class Launch:
    """One entry of the timeline; `call` is the number of the host's call that caused it."""

    name: str
    start_us: float
    length_us: float
    part: str
    call: int

    @property
    def end_us(self) -> float:
        return self.start_us + self.length_us


@dataclass(frozen=True)
class Token:
    """Launches by start, the first launch of the next token as the end, and what the host did meanwhile."""

    launches: list[Launch]
    end_us: float
    host: list[Event] = field(default_factory=list)

    @property
    def begin_us(self) -> float:
        return self.launches[0].start_us

    @property
    def length_us(self) -> float:
        return self.end_us - self.begin_us


@dataclass(frozen=True)
class Call:
    """A call of the host: when, in whose scope, and whether Python made it."""

    start_us: float
    part: str
    outermost: bool


def tokens_of(events: Iterable[Event], on_gpu: bool) -> tuple[list[Token], int]:
    """Whole tokens in order, and how many launches no call of the host explains; those belong to no token.

    The last mark has no token: nothing says where it ends. Raises ValueError where nothing was launched.
    """
    seen = [event for event in events if event.get("ph") == "X"]
    host = [event for event in seen if event.get("cat") in HOST]
    calls = _calls(host)
    begins = sorted(event["ts"] for event in host if event["name"] == MARK)
    found, lost = _on_gpu(seen, host, calls) if on_gpu else (_on_cpu(host, calls), 0)
    launched = _by_token(found, begins)
    if not all(launched):
        raise ValueError(
            f"the profiler saw {len(found)} launches in {len(begins)} tokens, and in some none at all"
        )
    ordered = [_in_order(launches) for launches in launched]
    meanwhile = _by_token([(event["ts"], event) for event in host], begins)
    ends = [launches[0].start_us for launches in ordered[1:]]
    return [Token(*whole) for whole in zip(ordered, ends, meanwhile, strict=False)], lost


def by_replay_order(replayed: Sequence[Launch], stepped: Sequence[Launch]) -> tuple[list[Launch], str | None]:
    """`replayed` with the parts of `stepped`, one by one; or as it was, and where the two differ first."""
    if len(replayed) != len(stepped):
        return list(replayed), f"{len(replayed)} launches in a replay, {len(stepped)} one by one"
    pairs = list(zip(replayed, stepped, strict=True))
    for number, (one, other) in enumerate(pairs):
        if _kind(one.name) != _kind(other.name):
            said = f"launch {number} is {one.name[:60]} in a replay, {other.name[:60]} one by one"
            return list(replayed), said
    return [replace(one, part=other.part) for one, other in pairs], None


def by_name(launches: Iterable[Launch]) -> list[Launch]:
    """Parts by what kernels are called: the last resort."""
    return [replace(launch, part=part_of_name(launch.name)) for launch in launches]


def part_of_name(name: str) -> str:
    return next((part for part, pattern in NAMES if re.search(pattern, name, re.IGNORECASE)), "other")


def parts_ms(launches: Iterable[Launch]) -> dict[str, float]:
    """Milliseconds of each part; they sum to the time in which anything ran."""
    sums = dict.fromkeys(PARTS, 0.0)
    for launch in launches:
        sums[launch.part] += launch.length_us / 1e3
    return sums


def _calls(host: list[Event]) -> dict[int, Call]:
    """Every event of the host by identity: a walk through nested events, outer ones first.

    Not thread by thread: one thread decodes, and the driver's calls need not stand under its number.
    """
    found: dict[int, Call] = {}
    around: list[tuple[float, str]] = []
    operator_until = float("-inf")
    for event in sorted(host, key=lambda event: (event["ts"], -event["dur"])):
        while around and around[-1][0] <= event["ts"]:
            around.pop()
        end, own = event["ts"] + event["dur"], _own_part(event)
        part = own or (around[-1][1] if around else "other")
        outermost = event["cat"] == "cpu_op" and event["ts"] >= operator_until
        if outermost:
            operator_until = end
        if own:
            around.append((end, own))
        found[id(event)] = Call(event["ts"], part, outermost)
    return found


def _own_part(event: Event) -> str | None:
    """What a scope, or an operator of ours, says of itself."""
    name = event["name"]
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else OPERATORS.get(name)


def _on_gpu(
    seen: list[Event], host: list[Event], calls: dict[int, Call]
) -> tuple[list[tuple[float, Launch]], int]:
    """Launches of the device with the time of the call that caused each, and how many have none.

    Where the call itself was not seen, the operator or scope that it was made in stands for it.
    """
    by_number = {e["args"]["correlation"]: calls[id(e)] for e in host if "correlation" in e.get("args", {})}
    within = {e["args"]["External id"]: calls[id(e)] for e in host if "External id" in e.get("args", {})}
    launched = [event for event in seen if event.get("cat") in DEVICE]
    found = []
    for event in launched:
        own = event["args"]
        call = by_number.get(own.get("correlation")) or within.get(own.get("External id"))
        if call is not None:
            number = own.get("correlation", -1)
            launch = Launch(event["name"], event["ts"], event["dur"], call.part, number)
            found.append((call.start_us, launch))
    return found, len(launched) - len(found)


def _on_cpu(host: list[Event], calls: dict[int, Call]) -> list[tuple[float, Launch]]:
    own = [event for event in host if calls[id(event)].outermost]
    return [
        (event["ts"], Launch(event["name"], event["ts"], event["dur"], calls[id(event)].part, number))
        for number, event in enumerate(own)
    ]


def _in_order(launches: list[Launch]) -> list[Launch]:
    """By start, and cut where the one before still ran, so that lengths sum to the time in which anything ran."""
    ordered: list[Launch] = []
    until = float("-inf")
    for launch in sorted(launches, key=lambda launch: launch.start_us):
        end, start = launch.end_us, max(launch.start_us, until)
        until = max(end, start)
        ordered.append(replace(launch, start_us=start, length_us=until - start))
    return ordered


def _by_token(timed: Iterable[tuple[float, T]], begins: list[float]) -> list[list[T]]:
    """What happened in each token, by its time and the tokens' marks."""
    found: list[list[T]] = [[] for _ in begins]
    for time_us, one in timed:
        number = bisect_right(begins, time_us) - 1
        if number >= 0:
            found[number].append(one)
    return found


def _kind(name: str) -> str:
    """Copies and fills say where from and to, which a graph may say otherwise."""
    return name.split()[0] if name.startswith(("Memcpy", "Memset")) else name
