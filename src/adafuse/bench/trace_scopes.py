"""Which part of a decode step a piece of code belongs to, said to the profiler while it runs.

In: the plain model's own modules; then, while an arm is decoding, its adapter (or None). Out: inside `scopes`, a
record_function around whatever begins a part; afterwards every attribute is the one that stood there before, so that
a timed path never carries one. The innermost scope wins: a frozen linear inside the attention module is `base_gemm`.
Parts: `base_gemm` the frozen products, the head's too; `attention` the rest of the attention modules; `adapters` what
the experts add; `routing` the routers; `switch` what writes experts into weights; `other` norms, activations, argmax.
A kernel that does two things counts where its bytes are: the joined product of W with the experts' A behind it, and
strategy fused's one kernel, are `base_gemm`; the expand that chooses its experts on its way is `adapters`.
Next: trace_parts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

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
        for layer in _layers_of_peft(model):
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


def _layers_of_peft(model: nn.Module) -> list[nn.Module]:
    """PEFT's own modules, where an arm runs those."""
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def _scope(stack: ExitStack, owner: Any, name: str, part: str | Callable[[Any], str]) -> None:
    """Put the scope around `owner.name` until `stack` closes; `part` may depend on the first argument."""
    _around(
        stack,
        owner,
        name,
        lambda *args: record_function(PREFIX + (part if isinstance(part, str) else part(args[0]))),
    )


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
