"""transformers' own `generate` on an adapted model: its decode steps go through the installed strategy, or it refuses.

transformers knows nothing of strategies: it calls the model's forward with one token and a cache, which here would run
the unmerged form, whatever is installed. So a `Host` looks at every forward: one token on a cache that holds something
is a decode step, everything else (a prompt, a chunk of one) is not. In: a model and how its adapter decodes. Out: its
`generate` and the pipelines on top of it, as they always were, by another path. Next: adapter.py, which installs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# of a request, what would decode by forwards of several tokens, which no strategy applies to
SEVERAL_AT_ONCE = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "dola_layers",
)
# transformers compiles the forward that fills one
STATIC = (
    "static",
    "offloaded_static",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
)
# transformers' own batching server, with attention of its own
SERVERS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
GATHER = "use one that does not merge, such as gather"


@dataclass
class Host:
    """Of one model while a strategy is installed. `decoding` is where its decode steps happen (Adapter.decoding)."""

    model: nn.Module
    decoding: Callable[[], AbstractContextManager[None]]
    # which the strategy has laid out
    laid_out: list[nn.Parameter]
    # its strategy merges a selection for every token
    merging: bool
    # its router reads a state of each row, which does not move with the rows of a cache
    follows: bool = False
    # layers share the gates of the forward that runs
    shares: bool = False
    # why transformers may not decode at all, if so
    refusal: str | None = None
    # whoever decodes by a loop of his own says where decode steps happen
    paused: bool = False
    _where: tuple[torch.device, torch.dtype] | None = None
    _versions: dict[int, int] = field(default_factory=dict)
    # the thread whose forward runs
    _running: int | None = None
    _inside: ExitStack = field(default_factory=ExitStack)
    _is_inside: bool = False
    _sequence: bool = False
    _hosted: ExitStack = field(default_factory=ExitStack)

    # No context managers here: whoever drops the adapted object and keeps its model keeps the adapter in it.
    def open(self) -> None:
        """From now on `generate` is ours, and what cannot be is refused."""
        self._where, self._versions = _where(self.model), _versions(self.laid_out)
        own = {"generate": self._generate, "save_pretrained": _refuse_to_save}
        own |= dict.fromkeys(SERVERS, _refuse_server)
        for name, ours in own.items():
            if hasattr(self.model, name):
                self._hosted.callback(self._give_back, name, vars(self.model).get(name))
                theirs = getattr(self.model, name)
                setattr(self.model, name, functools.update_wrapper(functools.partial(ours, theirs), theirs))

    def close(self) -> None:
        """The model's own `generate` is back, and nobody looks at its forwards any more."""
        self._hosted.close()
        self._leave()

    def watch(self) -> None:
        """From now on every forward is looked at: a decode step outside any `generate` ends by itself."""
        for handle in self._hooks():
            self._hosted.callback(handle.remove)

    def _give_back(self, name: str, was: object) -> None:
        vars(self.model).pop(name, None)
        if was is not None:
            setattr(self.model, name, was)

    def _hooks(self) -> list[RemovableHandle]:
        return [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]

    def _generate(
        self, theirs: Callable[..., Any], inputs: Tensor | None = None, *args: Any, **options: Any
    ) -> Any:
        """A merged selection goes on from token to token and is taken out when the sequence ends, however it ends."""
        self.refuse_changed()
        config = options.get("generation_config", args[0] if args else None)
        if self.refusal is not None:
            raise ValueError(self.refusal)
        asked = functools.partial(_asked, options, config, self.model.generation_config)
        _refuse_ways(asked, options.get("past_key_values"))
        if self.merging:
            _refuse_rows(asked, (inputs, options.get("input_ids"), options.get("inputs_embeds")))
        if self.follows and (asked("num_beams") or 1) > 1:
            raise ValueError(
                "num_beams takes rows of the cache for others, and this router reads a state of each: leave it out"
            )
        hooks, self._sequence = self._hooks(), True
        try:
            return theirs(inputs, *args, **options)
        finally:
            self._sequence = False
            for hook in hooks:
                hook.remove()
            self._leave()

    def refuse_moved(self) -> None:
        """Raise ValueError where what the strategy has laid out lies elsewhere than the model, or in another dtype."""
        if _where(self.model) != self._where:
            raise ValueError(
                "the model was moved or cast beneath its adapter: move the adapted object itself, adapted.to(...)"
            )

    def refuse_changed(self) -> None:
        """Raise ValueError where experts or routers are not those that were laid out, as far as torch counts changes: a
        write into `p.data` it does not.
        """
        self.refuse_moved()
        # parameters of a copied model are none of these
        if any(self._versions.get(one, now) != now for one, now in _versions(self.laid_out).items()):
            raise ValueError(
                "experts or routers were changed beneath the strategy, which has laid them out: call use() on the "
                "adapted object"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.shares and self._running not in (None, get_ident()):
            raise ValueError(
                "another thread runs this model, whose layers share the gates of one forward: take turns, or load it "
                "once a thread"
            )
        self._running = get_ident()
        if self.paused:
            return
        self.refuse_moved()
        if not _is_step(args, options):
            self.refuse_changed()
            self._leave()
        elif not self._is_inside:
            if not self._sequence:
                # kernels have no gradient, and a merged weight would become part of a graph
                self._inside.enter_context(torch.no_grad())
            self._inside.enter_context(self.decoding())
            self._is_inside = True

    def _after(self, *_: object) -> None:
        if self._running not in (None, get_ident()):
            return
        self._running = None
        if not self._sequence:
            self._leave()

    def _leave(self) -> None:
        self._is_inside = False
        self._inside.close()


def _where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(model.parameters())
    return first.device, first.dtype


def _versions(parameters: Iterable[nn.Parameter]) -> dict[int, int]:
    """How often each was written to, by its id."""
    return {id(one): one._version for one in parameters if not one.is_inference()}


def _refuse_server(*_: object, **__: object) -> None:
    raise ValueError(
        "transformers' server of batches has a forward of its own, which knows no experts: use generate"
    )


def _refuse_to_save(*_: object, **__: object) -> None:
    raise ValueError(
        "the model has an adapter inside, which no checkpoint has room for: save the adapter (adapted.save), a merged "
        "model (adapted.merge), or detach it first"
    )


def _is_step(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """One token, on a cache that holds others."""
    rows = options.get("input_ids", args[0] if args else None)
    rows = options.get("inputs_embeds") if rows is None else rows
    cache = options.get("past_key_values")
    return rows is not None and rows.shape[1] == 1 and cache is not None and int(cache.get_seq_length()) > 0


def _asked(options: dict[str, Any], config: Any, default: Any, name: str) -> Any:
    """As transformers decides: what the call says, else its config, else the model's."""
    given = (options.get(name), getattr(config, name, None), getattr(default, name, None))
    return next((one for one in given if one is not None), None)


def _refuse_ways(asked: Callable[[str], Any], cache: Any) -> None:
    """Raise ValueError for a way of decoding that no strategy is for."""
    for name in SEVERAL_AT_ONCE:
        if asked(name):
            raise ValueError(
                f"{name} decodes by forwards of several tokens, which no strategy is for: leave it out"
            )
    if asked("use_cache") is False:
        raise ValueError("use_cache=False decodes by whole sequences, which no strategy is for: leave it out")
    if asked("cache_implementation") in STATIC or getattr(cache, "is_compileable", False):
        raise ValueError(
            "a static cache makes transformers compile the forward without the strategy: leave it out, or call "
            "adafuse's own generate with runtime='graph'"
        )


def _refuse_rows(asked: Callable[[str], Any], prompts: Iterable[Any]) -> None:
    """Raise ValueError for more than one sequence."""
    for name in ("num_beams", "num_return_sequences"):
        if (asked(name) or 1) > 1:
            raise ValueError(
                f"{name}={asked(name)} needs a selection a row, and this strategy merges one: {GATHER}"
            )
    rows = next((len(one) for one in prompts if one is not None), 1)
    if rows > 1:
        raise ValueError(f"a batch of {rows} needs a selection a row, and this strategy merges one: {GATHER}")
