"""From what the profiler saw to the tokens, their launches, and the part of each.

In: the events of a Chrome trace. Out: `Token`s with their `Launch`es in order, each with its part. On a GPU a launch is
a kernel, copy or fill; the host's call that caused it (same correlation) lies in a scope, or in none. Behind a
captured graph there is no scope: its launches take the parts of the same step launched one by one, in order, if the
names agree. On a CPU a launch is an operator called from Python: what it calls itself is how it is done, not a launch.
Next: trace.py.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adafuse.bench.trace_scopes import MARK, OPERATORS, PARTS, PREFIX

Event = dict[str, Any]
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
HOST = ("cpu_op", "user_annotation", *CALLS)
# Names of kernels, first match wins. A library's product of experts looks like one of the backbone: by name it is base.
NAMES = (
    ("switch", r"^switch_kernel"),
    ("routing", r"^route_kernel"),
    ("adapters", r"^(shrink|expand|expand_all)_kernel"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("base_gemm", r"^(fused|linear)_kernel|gemm|gemv|cutlass|cublas|nvjet|splitk|dot_kernel|tem_fused\w*mm"),
)


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
    by_token: list[list[Launch]] = [[] for _ in begins]
    for called_us, launch in found:
        number = bisect_right(begins, called_us) - 1
        if number >= 0:
            by_token[number].append(launch)
    if not all(by_token):
        raise ValueError(
            f"the profiler saw {len(found)} launches in {len(begins)} tokens, and in some none at all"
        )
    ordered = [_in_order(launches) for launches in by_token]
    meanwhile = _between(host, begins)
    ends = [launches[0].start_us for launches in ordered[1:]]
    return [Token(*whole) for whole in zip(ordered, ends, meanwhile, strict=False)], lost


def by_replay_order(replayed: Sequence[Launch], stepped: Sequence[Launch]) -> tuple[list[Launch], str | None]:
    """`replayed` with the parts of `stepped`, one by one; or as it was, and where the two differ first."""
    if len(replayed) != len(stepped):
        return list(replayed), f"{len(replayed)} launches in a replay, {len(stepped)} one by one"
    for number, (one, other) in enumerate(zip(replayed, stepped, strict=True)):
        if _kind(one.name) != _kind(other.name):
            return list(
                replayed
            ), f"launch {number} is {one.name[:60]} in a replay, {other.name[:60]} one by one"
    pairs = zip(replayed, stepped, strict=True)
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
    own = [(event, calls[id(event)]) for event in host if calls[id(event)].outermost]
    return [
        (event["ts"], Launch(event["name"], event["ts"], event["dur"], call.part, number))
        for number, (event, call) in enumerate(own)
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


def _between(host: list[Event], begins: list[float]) -> list[list[Event]]:
    """What the host did in each token, by the token's mark."""
    found: list[list[Event]] = [[] for _ in begins]
    for event in host:
        number = bisect_right(begins, event["ts"]) - 1
        if number >= 0:
            found[number].append(event)
    return found


def _kind(name: str) -> str:
    """Copies and fills say where from and to, which a graph may say otherwise."""
    return name.split()[0] if name.startswith(("Memcpy", "Memset")) else name
