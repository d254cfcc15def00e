"""A model with an adapter inside, as people who know transformers and PEFT expect one to behave.

In: a causal LM of transformers, its tokenizer, an `Adapter`. Out: an nn.Module that generates, tells its gates, saves,
merges, trains, moves, and gives the backbone back. While it is in service the chosen strategy is installed, so that
transformers' own generate decodes by it too (adapters/hosted.py). Next: api.py, whose functions make one.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from adafuse import strategies
from adafuse.adapters import reference, store
from adafuse.adapters.adapter import Adapter
from adafuse.config import Dtype, ExpertKind, Method, Routing, Runtime, StrategyName
from adafuse.engine import answers
from adafuse.engine.decode import forward_logits
from adafuse.engine.decoders import Decoder, Eager
from adafuse.engine.make import make
from adafuse.model.declared import positions
from adafuse.model.projections import unjoin
from adafuse.refusals import MERGING, PEFT, refuse_use
from adafuse.strategies.joined import make_room

# the method of a model without an adapter
PLAIN = Method(name="base", routing=Routing.none, expert_targets=[])
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
_N = TypeVar("_N", StrategyName, Runtime, Dtype)


class Adapted(nn.Module):
    """A causal LM of transformers (`model`) with an adapter inside, its tokenizer, and how it decodes.

    `strategy` and `runtime` say what `generate` uses, ours and transformers' own; `use` changes them. Attributes that
    are not here are those of `model`. `train()` makes the adapter trainable, `eval()` puts it into service again.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, adapter: Adapter | None, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.adapter, self._name = model, tokenizer, adapter, name
        self._strategy, self._runtime = StrategyName.gather, Runtime.eager
        # a captured decoder: of what, for how many tokens
        self._kept: tuple[Any, int, Decoder] | None = None
        self._streaming = False
        self._required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.eval()
        super().train(False)
        if adapter is not None:
            make_room(adapter)
        self._install()
        for parameter in [] if adapter is None else adapter.trained():
            # in service too: Trainer makes its optimiser of such before it calls train()
            parameter.requires_grad_(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """Copied apart from its model: what an adapter undoes when it is taken out is bound to the first one."""
        with self._without():
            made = type(self).__new__(type(self))
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__ | {"_kept": None}, memo))
        if self._active is not None:
            made._install()
        for ours, theirs in zip(self.parameters(), made.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        return made

    def _get_name(self) -> str:
        """That of `model`: Trainer shifts smoothed labels where it knows the name for a causal LM's."""
        return str(self.model._get_name())

    def __getattr__(self, name: str) -> Any:
        """As PEFT's models do it: what is not ours is the backbone's (config, device, generation_config, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def generation_config(self) -> Any:
        """The model's: one that is set here is what generates."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @property
    def strategy(self) -> str:
        """By which decode steps apply the experts."""
        return self._strategy.name

    @property
    def runtime(self) -> str:
        """By which decode steps are launched."""
        return self._runtime.name

    def use(self, strategy: str | None = None, runtime: str | None = None) -> Adapted:
        """From now on decode by this strategy and runtime; what cannot be is refused with one line."""
        chosen = self._checked(strategy, runtime, 1)
        with self._without():
            self._strategy, self._runtime = chosen
        return self

    def generate(
        self,
        inputs: Any = None,
        *,
        strategy: str | None = None,
        runtime: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        seed: int = 0,
        **transformers: Any,
    ) -> Any:
        """Continuations: of a text or chat a text, of a list of them a list, of ids [B, S] ids [B, S + n].

        `strategy` and `runtime`: None is the chosen one (`use`). At a `temperature` of 0, the default, the likeliest
        token; else drawn within `top_p`, alike for the same `seed`. A row ends at the model's end tokens or before a
        text in `stop`, at the latest after `max_new_tokens` (64). `stream=True` gives an iterator over the pieces of
        one text. Called as transformers calls it, with input_ids=, it is transformers' own generate through the same
        strategy. Raises ValueError, one line.
        """
        if inputs is None:
            if not transformers:
                raise ValueError(f"generate() needs prompts: {answers.FORMS}")
            own = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
            self._refuse_ours(
                {"strategy": strategy, "runtime": runtime, "stop": stop, "stream": stream or None}
            )
            return self.model.generate(
                **transformers, **{key: value for key, value in own.items() if value is not None}
            )
        if transformers:
            raise ValueError(
                f"generate() has no option {next(iter(transformers))}: transformers' own go with input_ids="
            )
        self.require_service()
        answers.warn_unapplied(self.model.generation_config)
        most, padding = 64 if max_new_tokens is None else max_new_tokens, self._padding
        prompts = answers.read(inputs, self.tokenizer, self.model, padding)
        rows, length = prompts.ids_BS.shape
        if not isinstance(most, int) or most < 1:
            raise ValueError(f"max_new_tokens={most!r} must be a whole number of at least 1")
        if length + most > (longest := positions(self.model.config.to_dict())):
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens={most} exceed the model's {longest} positions"
            )
        if stream and (prompts.form == "ids" or rows > 1):
            raise ValueError("stream=True gives the pieces of one text: give one prompt, as a text or a chat")
        chosen = self._checked(strategy, runtime, rows)
        ending = answers.end_of(self.model, self.tokenizer, stop)
        choose = answers.chooser(temperature or 0.0, 1.0 if top_p is None else top_p, seed, self.model.device)

        def continued() -> Iterator[list[list[int]]]:
            with self._decoder(*chosen, rows, length + most) as decoder:
                yield from answers.continued(decoder, prompts, most, choose, ending)

        if stream:
            return self._stream(continued(), ending)
        with torch.inference_mode(False):
            *_, found = continued()
        if prompts.form == "ids":
            return answers.whole(prompts, found, padding)
        texts = [ending.text(row) for row in found]
        return texts[0] if prompts.form == "text" else texts

    def gates(self, texts: Any) -> pd.DataFrame:
        """What every router chose for every token: a row for each chosen expert.

        Columns: text (its number), position, token, layer and site (a decision for all layers has neither: <NA> and
        "token"), expert, weight. A token that is left to the backbone alone has expert -1 and weight 0.
        """
        adapter = self.require_adapter()
        self.require_service()
        if not adapter.installed:
            raise ValueError("the adapter is disabled: ask for its gates outside disable_adapter()")
        if not adapter.routers():
            raise ValueError(f"method {adapter.method.name} has no gates: every token has its one expert")
        prompts = answers.read(texts, self.tokenizer, self.model, self._padding)
        names = {id(router): name for name, router in adapter.routers().items()}
        lines: list[dict[str, Any]] = []
        for number, ids_S in enumerate(prompts.ids_BS):
            kept_S = ids_S if prompts.mask_BS is None else ids_S[prompts.mask_BS[number].bool()]
            with adapter.collecting() as said:
                forward_logits(self.model, kept_S[None])
            pieces = [self.tokenizer.decode([one]) if self.tokenizer else str(one) for one in kept_S.tolist()]
            for router, gates in said:
                lines += _gate_lines(number, pieces, names[id(router)], gates.chosen(), gates.weight_TK)
        return pd.DataFrame(lines).astype({"layer": "Int64"})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Every expert as a folder that plain PEFT opens, beside the routers; `load` reads it again, bit for bit."""
        adapter, path = self.require_adapter(), Path(folder).expanduser()
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a folder")
        with self._without():
            store.save(adapter, path, self._name)

    def merge(
        self, experts: Sequence[int] | None = None, weights: Sequence[float] | None = None
    ) -> nn.Module:
        """An ordinary model of transformers, a copy, with these experts in its weights for every token: their weighted
        sum (even weights where none are given), and whatever plain LoRA stands beside them. Ours stays as it is.
        """
        adapter = self.require_adapter()
        if adapter.method.expert_kind is not ExpertKind.lora:
            raise ValueError(
                f"the experts of method {adapter.method.name} are not linear in the weight, so they cannot be merged"
            )
        chosen, shares = _selection(adapter, experts, weights)
        with self._without():
            merged = copy.deepcopy(self.model)
        for path, site in adapter.sites.items():
            weight = merged.get_submodule(path).weight
            added = [
                (lora, of, by)
                for lora, of, by in ((site.experts, chosen, shares), (site.static, [0], [1.0]))
                if lora
            ]
            total = sum(
                (reference.delta(lora, of, by) for lora, of, by in added), start=weight.detach().float()
            )
            weight.data.copy_(total)
        return merged

    def detach(self) -> nn.Module:
        """The model without the adapter, its weights bit for bit as they were; this object has done its work then."""
        self._refuse_stream()
        if self._active is not None:
            self._active.remove()
        self._kept, self.adapter, self._strategy = None, None, StrategyName.dense
        unjoin(self.model)
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        return self.model

    @contextmanager
    def disable_adapter(self) -> Iterator[nn.Module]:
        """The plain model inside, as PEFT's method of this name; afterwards the adapter is in place again."""
        self._refuse_stream()
        with self._without():
            yield self.model

    def __enter__(self) -> Adapted:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """That of `model`, its names for Trainer to see; one token on a cache is a decode step, by the strategy."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    def train(self, mode: bool = True) -> Adapted:
        """Trainable experts and routers, unmerged, or (False, as `eval`) the chosen strategy in service."""
        # the flag alone does not tell: torch.compile's wrapper sets it before it calls this, others call model.eval()
        trains = [self.training, self.model.training]
        if self._active is not None:
            trains.append(self._active.host is None)
        if all(one is mode for one in trains):
            return self
        with self._without():
            super().train(mode)
            self._kept = None
        if mode and self._active is not None and self.model.dtype != torch.float32:
            # of 20 steps of AdamW at 1e-4 four fifths of lora_A in bf16 had seen nothing
            warnings.warn(
                f"experts in {self.model.dtype} lose steps that are smaller than half of a weight's last bit: use fit, "
                "or train a model in float32 under torch.autocast",
                stacklevel=2,
            )
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; what is laid out for a strategy is laid out anew."""
        self._refuse_stream()
        found = super().load_state_dict(*args, **kwargs)
        self._kept = None
        with self._without():
            return found

    def require_service(self) -> None:
        """Raises ValueError while the adapter is trained or a stream is open."""
        if self._streaming:
            raise ValueError("a stream of this model is still open: read it to its end, or close() it")
        if self.training:
            raise ValueError("the adapter is installed for training: call eval() first")
        if self._active is not None and self._active.host is not None:
            self._active.host.refuse_changed()

    def require_adapter(self) -> Adapter:
        """Raises ValueError where there is none (any more)."""
        if self.adapter is None:
            raise ValueError("there is no adapter in this model: load one, attach one, or it was detached")
        return self.adapter

    def require_tokenizer(self) -> Any:
        """Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer: pass tokenizer= when loading")
        return self.tokenizer

    @contextmanager
    def training_installed(self, only: str | None = None) -> Iterator[None]:
        """The adapter is in for a fit inside, in fp32; afterwards in the model's dtype and in service again."""
        adapter = self.require_adapter()
        frozen, adapter.experts_frozen = adapter.experts_frozen, adapter.experts_frozen or only == "router"
        self._kept = None
        try:
            with self._without(), adapter.installing():
                try:
                    yield
                finally:
                    # a fit that was interrupted would leave dropout behind
                    self.model.train(self.training)
        finally:
            adapter.experts_frozen = frozen

    def _apply(self, fn: Any, recurse: bool = True) -> Adapted:
        """`to`, `half`, `cuda`: what is laid out for a strategy is laid out anew."""
        with self._without():
            super()._apply(fn, recurse)
            if self.adapter is not None:
                for module in self.adapter.modules():
                    module.to(self.model.device)
                self._kept = None
                make_room(self.adapter)
        return self

    @property
    def _active(self) -> Adapter | None:
        """None for the plain model, and while the adapter is disabled."""
        return self.adapter if self.adapter is not None and self.adapter.installed else None

    @property
    def _padding(self) -> int:
        """Any id is a padding in front, for no one sees it; behind a row it is the one that tokenizers skip."""
        for of in (self.model.generation_config, self.tokenizer):
            if isinstance(own := getattr(of, "pad_token_id", None), int):
                return own
        end = getattr(self.model.generation_config, "eos_token_id", None)
        return int((end[0] if isinstance(end, list) else end) or 0)

    def _checked(self, strategy: str | None, runtime: str | None, rows: int) -> tuple[StrategyName, Runtime]:
        name = self._strategy if strategy is None else named(StrategyName, "strategy", strategy, PEFT)
        kind = self._runtime if runtime is None else named(Runtime, "runtime", runtime)
        method = PLAIN if self._active is None else self._active.method
        if strategy is None and self._active is None:
            # nothing to apply: the one that every runtime carries
            name = StrategyName.dense
        refuse_use(method, name, kind, rows, self.model.device.type)
        if rows > 1 and name in MERGING and method.routing is not Routing.none:
            raise ValueError(
                f"strategy {name.name} merges one selection, and {rows} prompts have one each: give one prompt at a "
                "time, or use strategy='gather'"
            )
        return name, kind

    @contextmanager
    def _decoder(self, strategy: StrategyName, runtime: Runtime, rows: int, length: int) -> Iterator[Decoder]:
        """Installed, for at most `length` tokens of `rows` sequences; afterwards what is in now is in again."""
        adapter = self._active
        if runtime is Runtime.eager:
            with self._using(strategy):
                yield Eager(self.model, adapter, strategy)
            return
        wanted = strategy, runtime, rows, adapter
        if self._kept is None or self._kept[0] != wanted or self._kept[1] < length:
            self._kept = wanted, length, make(self.model, adapter, strategy, runtime, length)
        decoder = self._kept[2]
        with self._without(), decoder.installed():
            yield decoder

    @contextmanager
    def _using(self, strategy: StrategyName) -> Iterator[None]:
        adapter = self._active
        if adapter is None:
            yield
        elif strategy is self._strategy and adapter.host is not None:
            if adapter.host.paused:
                raise ValueError(
                    "another thread generates by this model: take turns, or load it once a thread"
                )
            adapter.host.paused = True
            try:
                yield
            finally:
                adapter.host.paused = False
        else:
            with self._without(), adapter.installing(strategies.make(strategy)):
                yield

    def _install(self) -> None:
        """As this object is now: for training, or in service with the chosen strategy, which is laid out anew."""
        adapter = self.adapter
        if adapter is None:
            return
        if not self.training:
            adapter.to_dtype(self.model.dtype)
        # state that is made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            adapter.install(None if self.training else strategies.make(self._strategy))
        if adapter.host is None:
            return
        if self._runtime is not Runtime.eager:
            adapter.host.refusal = (
                f"transformers' own generate launches eagerly, and runtime={self.runtime} is chosen: give adafuse's "
                "generate a text, or say use(runtime='eager')"
            )
        adapter.host.watch()
        adapter.watch_backward()

    @contextmanager
    def _without(self) -> Iterator[None]:
        """The plain model inside; afterwards the adapter is back if it was in."""
        self._refuse_stream()
        active = self._active
        # whoever trains some of them, or the backbone's head too, goes on with that
        required = {parameter: parameter.requires_grad for parameter in self.parameters()}
        if active is not None:
            active.remove()
        try:
            yield
        finally:
            if active is not None:
                self._install()
                for parameter, was in required.items():
                    parameter.requires_grad_(was)

    def _stream(self, rows: Iterator[list[list[int]]], ending: answers.Ending) -> Iterator[str]:
        found = answers.pieces(rows, ending)
        try:
            while True:
                # whatever mode the reader is in between two pieces, and only while one is made
                with torch.inference_mode(False):
                    piece = next(found, None)
                if piece is None:
                    return
                self._streaming = True
                yield piece
                self._streaming = False
        finally:
            self._streaming = False
            rows.close()  # type: ignore[attr-defined]

    def _refuse_stream(self) -> None:
        if self._streaming:
            raise ValueError("a stream of this model is still open: read it to its end, or close() it")

    def _refuse_ours(self, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name}= goes with texts or ids as the first argument; with input_ids= use() decides it"
                )


def named(kind: type[_N], what: str, given: str, without: Sequence[_N] = ()) -> _N:
    """A member of an enum of config.py by its name. Raises ValueError, which lists the known ones."""
    known = [one for one in kind if one not in without]
    found = next((one for one in known if given in (one, one.name)), None)
    if found is None:
        raise ValueError(f"{what}={given!r} is none of {[one.name for one in known]}")
    return found


def _gate_lines(
    text: int, pieces: Sequence[str], router: str, index_SK: Tensor, weight_SK: Tensor
) -> Iterator[dict[str, Any]]:
    block = _BLOCK.match(router)
    site = router.rpartition(".")[2]
    for position, (token, chosen, weights) in enumerate(
        zip(pieces, index_SK.tolist(), weight_SK.tolist(), strict=True)
    ):
        for expert, weight in list(zip(chosen, weights, strict=True))[: 1 if chosen[0] < 0 else None]:
            yield {
                "text": text,
                "position": position,
                "token": token,
                "layer": int(block[1]) if block else None,
                "site": site,
                "expert": expert,
                "weight": weight,
            }


def _selection(
    adapter: Adapter, experts: Sequence[int] | None, weights: Sequence[float] | None
) -> tuple[list[int], list[float]]:
    count = min(site.lora.count for site in adapter.adapted().values())
    if experts is None and count > 1:
        raise ValueError(f"this adapter has {count} experts: say which, merge(experts=[...])")
    if isinstance(experts, int):
        raise ValueError(f"experts={experts} must be a list: merge(experts=[{experts}])")
    chosen = [0] if experts is None else list(experts)
    try:
        shares = [
            float(one) for one in ([1 / max(1, len(chosen))] * len(chosen) if weights is None else weights)
        ]
    except (TypeError, ValueError):
        raise ValueError(f"weights={weights!r} must be a list of numbers: one for each of {chosen}") from None
    odd = any(isinstance(one, bool) for one in chosen) or not set(chosen) <= set(range(count))
    if not chosen or odd or len(set(chosen)) < len(chosen):
        raise ValueError(f"experts={chosen} must be different numbers from 0 to {count - 1}")
    if len(shares) != len(chosen) or not all(map(math.isfinite, shares)):
        raise ValueError(
            f"weights={shares} must be {len(chosen)} finite numbers, one for each of experts={chosen}"
        )
    return chosen, shares
