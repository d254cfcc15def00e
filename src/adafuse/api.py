"""Dynamic adapters in one's own code: load or attach, fit, generate, look at the gates, save, merge, measure.

    import adafuse
    adapted = adafuse.load("models/llama", "adapters/mine")
    print(adapted.generate("Sort: cab\\n"))

In: an ordinary model of transformers, or a folder. Out: an `Adapted`, an nn.Module whose `model` is that very model
with the adapter inside; `detach` gives it back as it was, bit for bit. docs/api.md has an example of everything.
"""

from __future__ import annotations

import copy
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from adafuse import strategies
from adafuse.adapters import imports, reference, store
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.layers import Site
from adafuse.adapters.published import is_published, load_published
from adafuse.bench import frame
from adafuse.bench.latency import Made, tokens_behind
from adafuse.compose import recipe, typed
from adafuse.config import (
    LINEARS,
    Config,
    Dtype,
    ExpertKind,
    Experts,
    Fit,
    Latency,
    Method,
    Model,
    Routing,
    Runtime,
    StrategyName,
    Weights,
)
from adafuse.data import rows as data_rows
from adafuse.data import tokens
from adafuse.engine import answers
from adafuse.engine.decode import forward_logits
from adafuse.engine.decoders import Decoder, Eager
from adafuse.engine.make import make
from adafuse.model import backbone
from adafuse.model.checkpoint import check_folder, dtype_of
from adafuse.model.declared import check_declared, positions
from adafuse.model.projections import unjoin
from adafuse.refusals import MERGING, PEFT, refuse_geometry, refuse_method, refuse_use
from adafuse.strategies.joined import make_room

ALL_LINEAR = "all-linear"
PLAIN = Method(name="base", routing=Routing.none, expert_targets=[])
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
_N = TypeVar("_N", StrategyName, Runtime, Dtype)


def load(
    model_or_folder: nn.Module | str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    any_base: bool = False,
    top_k: int | None = None,
) -> Adapted:
    """A saved adapter in its backbone, ready to generate; without `adapter` the plain backbone, with the same methods.

    `model_or_folder`: a causal LM of transformers (Llama, Mistral, Qwen2, Qwen3), a checkpoint folder, a hub id, or an
    adapter's folder alone, which names its backbone. `dtype`: None is a checkpoint's own on a GPU, float32 on a CPU.
    `any_base`: also a backbone that the adapter was not made for. The published files of MixLoRA and MoLA are adapters
    too, and MoLA's do not say `top_k`. Raises ValueError, one line, for files that are not whole or do not fit each
    other.
    """
    if adapter is None and _is_adapter(model_or_folder):
        adapter, model_or_folder = (
            _path(model_or_folder),
            store.describe(Path(_path(model_or_folder)))["base_model"],
        )
    folder = None if adapter is None else Path(adapter).expanduser()
    if folder is not None and is_published(folder):
        model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
        return Adapted(model, tokenizer, load_published(model, folder, top_k), name)
    saved = None if folder is None else _saved(folder)
    model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
    if folder is None or saved is None:
        return Adapted(model, tokenizer, None, name)
    found = store.load(Adapter(model, *saved, seed=0), folder, any_base=any_base)
    return Adapted(model, tokenizer, found, name)


def attach(
    model_or_folder: nn.Module | str | os.PathLike[str],
    method: str = "adafuse",
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    rank: int = 16,
    experts: int | None = None,
    top_k: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Adapted:
    """A fresh adapter on a backbone; its experts start at zero, so that nothing changes before `fit`.

    `method` is a file of conf/method/: adafuse, adafuse_layerwise, mola, moral, pesc, mixlora or lora. `targets`:
    "all-linear", or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj. `experts` and `top_k`: 8 and
    2, of lora 1. `alpha`: twice the rank. `options` are fields of config.Method, such as dropout=0.1,
    router_input="embedding" or null_expert=True. Raises ValueError, one line, before anything is loaded.
    """
    count = (1 if method == "lora" else 8) if experts is None else experts
    names = (
        list(LINEARS) if targets == ALL_LINEAR else [targets] if isinstance(targets, str) else list(targets)
    )
    geometry = Experts(names, rank, count, min(2, count) if top_k is None else top_k, alpha or 0.0)
    refuse_geometry(geometry)
    geometry.alpha = float(2 * rank if alpha is None else alpha)
    _refuse_unknown("attach", options)
    if method == "lora":
        if count != 1:
            raise ValueError(
                f"lora has one expert for every token, not {count}: leave experts= out, or use method='adafuse'"
            )
        options = {"alpha": geometry.alpha} | options
    chosen = recipe(method, geometry, **options)
    refuse_method(chosen, geometry)
    model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
    return Adapted(model, tokenizer, Adapter(model, chosen, geometry, seed), name)


def from_loras(
    model_or_folder: nn.Module | str | os.PathLike[str],
    folders: Sequence[str | os.PathLike[str]],
    *,
    routing: str = "token",
    top_k: int | None = None,
    missing_as_zeros: bool = False,
    seed: int = 0,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Adapted:
    """PEFT LoRA folders of anybody's as experts 0, 1, ... behind a fresh router, which alone is trained by `fit`.

    `routing`: "token" (one gate for all layers, as adafuse), "layerwise" (a gate in every linear) or "blockwise" (a
    gate a block, as mixlora: folders on the MLP). Targets, rank and scaling are theirs; a linear that one of them lacks
    is refused, or zero with `missing_as_zeros`. `options` as for `attach`. Raises ValueError, one line, for what is no
    LoRA.
    """
    method = {"token": "adafuse", "layerwise": "adafuse_layerwise", "blockwise": "mixlora"}.get(routing)
    if method is None:
        raise ValueError(f"routing={routing!r} is none of ['token', 'layerwise', 'blockwise']")
    if isinstance(folders, str | os.PathLike) or not folders:
        raise ValueError(f"folders={folders!r} must be a list of PEFT LoRA folders, at least one")
    paths = [Path(folder).expanduser() for folder in folders]
    _refuse_unknown("from_loras", options)
    model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
    loras = [imports.inspect(path, model.config.to_dict()) for path in paths]
    imports.refuse_lacking(loras, missing_as_zeros)
    geometry = imports.geometry(loras, min(2, len(paths)) if top_k is None else top_k)
    refuse_geometry(geometry)
    chosen = recipe(method, geometry, **options)
    refuse_method(chosen, geometry)
    imports.refuse_misfits(loras, chosen, geometry)
    adapter = Adapter(model, chosen, geometry, seed)
    imports.load_experts(adapter, paths, missing_as_zeros)
    return Adapted(model, tokenizer, adapter, name)


def fit(
    adapted: Adapted,
    items: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch: int = 8,
    accumulation: int = 1,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_length: int = 512,
    only: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    save_every_steps: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Train the adapter in place by transformers.Trainer; the losses by step, as a frame.

    `items` are {"prompt", "answer"} or {"prompt", "choices", "label"}; the loss is that of the answer alone. `only`:
    "router" leaves the experts as they are, as those of `from_loras` always are until they are saved and loaded. With
    a `folder` checkpoints are kept there, and the same call goes on from the last. Raises ValueError, one line, for an
    item that is wrong, and where the fit diverges.
    """
    adapter, tokenizer = adapted.require_adapter(), adapted.require_tokenizer()
    if only not in (None, "router"):
        raise ValueError(f"only={only!r} is neither None (experts and routers) nor 'router'")
    if only == "router" and not adapter.routers():
        raise ValueError(f"method {adapter.method.name} has no router to train: leave only= out")
    # seconds, of which who only loads and generates should know nothing
    from adafuse.training import trainer

    limit = min(max_length, positions(adapted.model.config.to_dict()))
    encoded = tokens.training_rows(data_rows.checked(items), tokenizer, limit)
    knobs = Fit(
        steps,
        batch,
        accumulation,
        learning_rate,
        weight_decay,
        warmup_steps,
        limit,
        save_every_steps or steps,
    )
    if min(steps, batch, accumulation, knobs.save_every_steps) < 1:
        raise ValueError("steps, batch, accumulation and save_every_steps must be at least 1")
    with ExitStack() as stack:
        where = folder or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(adapted.training_installed(only))
        fitted = trainer.fit(adapted.model, encoded.rows, knobs, Path(where), adapter, seed=seed)
    return pd.DataFrame(fitted.losses).set_index("step")


def measure(
    adapted: Adapted,
    arms: Sequence[str],
    *,
    batch: int = 1,
    context: int = 64,
    rounds: int = 10,
    block_tokens: int = 64,
    check_tokens: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Milliseconds a token of arms, each checked against the fp32 reference before it is timed, in interleaved rounds.

    An arm is a strategy, "gather", or with a runtime, "gather/graph"; the backbone of every runtime is added. A row
    each: ms_per_token, low, high; ratio to the backbone in the same runtime, ratio_low, ratio_high; floor_ms, what
    reading the weights takes; check_*; reason, where there is no number. Intervals are of 95 % over the rounds of this
    process: another one may differ by a few per cent. `context` is that of the prompt, whose ids are seeded.
    """
    adapted.require_service()
    if min(batch, context, block_tokens, check_tokens - 3, rounds - 1) < 1:
        raise ValueError(
            "batch, context and block_tokens must be at least 1, rounds at least 2, check_tokens at least 4"
        )
    knobs = Latency(rounds, block_tokens, check_tokens=check_tokens)
    most = positions(adapted.model.config.to_dict())
    if context + tokens_behind(knobs) > most:
        raise ValueError(
            f"context={context} with {tokens_behind(knobs)} tokens behind it exceeds {most} positions"
        )
    parsed = {name: _arm(name) for name in arms}
    kinds = dict.fromkeys(runtime for _, runtime in parsed.values())
    plain = {frame.backbone(kind): Made(None, StrategyName.dense, kind) for kind in kinds}
    wanted = plain | {
        name: Made(adapted.require_adapter(), strategy, kind)
        for name, (strategy, kind) in parsed.items()
        if strategy is not None
    }
    refused = {
        name: reason
        for name, arm in wanted.items()
        if (reason := _refusal(arm, batch, adapted.model.device.type))
    }
    chosen = {name: arm for name, arm in wanted.items() if name not in refused}
    with adapted.disable_adapter() as model:
        return frame.measure(model, chosen, refused, batch, context, knobs, seed)


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

    def __getattr__(self, name: str) -> Any:
        """As PEFT's models do it: what is not ours is the backbone's (config, device, generation_config, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

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
        most, padding = 64 if max_new_tokens is None else max_new_tokens, self._padding
        prompts = answers.read(inputs, self.tokenizer, self.model, padding)
        rows, length = prompts.ids_BS.shape
        if most < 1:
            raise ValueError(f"max_new_tokens={most} must be at least 1")
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
        adapter = self.require_adapter()
        with self._without():
            store.save(adapter, Path(folder).expanduser(), self._name)

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
        self._kept, self.adapter = None, None
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of `model`; one token on a cache is a decode step, by the chosen strategy."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Adapted:
        """Trainable experts and routers, unmerged, or (False, as `eval`) the chosen strategy in service."""
        if mode is self.training:
            return self
        with self._without():
            super().train(mode)
            self._kept = None
        return self

    def require_service(self) -> None:
        """Raises ValueError while the adapter is trained or a stream is open."""
        if self._streaming:
            raise ValueError("a stream of this model is still open: read it to its end, or close() it")
        if self.training:
            raise ValueError("the adapter is installed for training: call eval() first")
        if self._active is not None and self._active.host is not None:
            self._active.host.refuse_moved()

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
                yield
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
        name = self._strategy if strategy is None else _named(StrategyName, "strategy", strategy, PEFT)
        kind = self._runtime if runtime is None else _named(Runtime, "runtime", runtime)
        method = PLAIN if self._active is None else self._active.method
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
        adapter.install(None if self.training else strategies.make(self._strategy))
        if adapter.host is None:
            return
        if self._runtime is not Runtime.eager:
            adapter.host.refusal = (
                f"transformers' own generate launches eagerly, and runtime={self.runtime} is chosen: give adafuse's "
                "generate a text, or say use(runtime='eager')"
            )
        adapter.host.watch()

    @contextmanager
    def _without(self) -> Iterator[None]:
        """The plain model inside; afterwards the adapter is back if it was in."""
        self._refuse_stream()
        active = self._active
        if active is not None:
            active.remove()
        try:
            yield
        finally:
            if active is not None:
                self._install()

    def _stream(self, rows: Iterator[list[list[int]]], ending: answers.Ending) -> Iterator[str]:
        try:
            for piece in answers.pieces(rows, ending):
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


def _backbone(
    source: nn.Module | str | os.PathLike[str],
    tokenizer: Any,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
) -> tuple[nn.Module, Any, str]:
    """The model, its tokenizer if there is one, and the name under which it is saved."""
    asked = (
        None if dtype is None else _named(Dtype, "dtype", str(dtype).removeprefix("torch."), (Dtype.auto,))
    )
    if isinstance(source, nn.Module):
        return _given(source, tokenizer, asked, device)
    where = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(source).expanduser()
    on_hub = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) is not None
    if on_hub:
        usual = Dtype.float32 if where == "cpu" else Dtype.bfloat16
        model = Model(name=str(source), weights=Weights.hub, hub_id=str(source), dtype=asked or usual)
    else:
        check_folder(path)
        model = Model(
            name=path.name,
            path=str(path),
            dtype=asked or (Dtype.float32 if where == "cpu" else dtype_of(path)),
        )
    found, own = backbone.load(Config(model=model, device=where))
    return found, tokenizer or own, str(source)


def _given(
    model: nn.Module, tokenizer: Any, dtype: Dtype | None, device: str | torch.device | None
) -> tuple[nn.Module, Any, str]:
    if isinstance(model, Adapted):
        raise ValueError("this model has an adapter already: detach() gives the plain one")
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generation_config"):
        raise ValueError(
            f"{type(model).__name__} is no causal LM of transformers: give one, or a checkpoint folder"
        )
    check_declared(config.to_dict(), type(model).__name__)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "this model has an adapter of PEFT inside: merge_and_unload() or unload() gives the plain one"
        )
    if any(isinstance(module, Site) for module in model.modules()):
        raise ValueError("this model has an adapter inside already: detach() gives the plain one")
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if spread or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is spread over devices (device_map): load it on one, an adapter lies beside its weights"
        )
    model.to(device=device, dtype=None if dtype is None else getattr(torch, dtype.name))
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None and (Path(name) / "tokenizer.json").is_file():
        tokenizer = backbone.tokenizer_of(Model(name=name, path=name), None)
    return model, tokenizer, name


def _refuse_unknown(where: str, options: Mapping[str, Any]) -> None:
    known = {one.name for one in fields(Method)} - {"name", "full", "learning_rate_factor"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{where}() has no option {unknown[0]}: a method has {', '.join(sorted(known))}")


def _saved(folder: Path) -> tuple[Method, Experts]:
    described = store.describe(folder)
    return typed(Method, described["method"]), typed(Experts, described["experts"])


def _is_adapter(source: object) -> bool:
    return not isinstance(source, nn.Module) and (Path(_path(source)) / "router_config.json").is_file()


def _path(source: Any) -> str:
    return str(Path(source).expanduser())


def _named(kind: type[_N], what: str, given: str, without: Sequence[_N] = ()) -> _N:
    known = [one for one in kind if one not in without]
    found = next((one for one in known if given in (one, one.name)), None)
    if found is None:
        raise ValueError(f"{what}={given!r} is none of {[one.name for one in known]}")
    return found


def _arm(name: str) -> tuple[StrategyName | None, Runtime]:
    """ "gather/graph" as a strategy (None for the backbone) and a runtime."""
    strategy, _, runtime = name.partition("/")
    kind = _named(Runtime, f"arm {name!r}: runtime", runtime or "eager")
    return None if strategy == frame.BACKBONE else _named(
        StrategyName, f"arm {name!r}: strategy", strategy
    ), kind


def _refusal(arm: Made, batch: int, where: str) -> str | None:
    try:
        refuse_use(
            PLAIN if arm.adapter is None else arm.adapter.method, arm.strategy, arm.runtime, batch, where
        )
    except ValueError as error:
        return str(error)
    return None


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
    chosen = [0] if experts is None else list(experts)
    shares = [1 / len(chosen)] * len(chosen) if weights is None else [float(one) for one in weights]
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(count)):
        raise ValueError(f"experts={chosen} must be different numbers from 0 to {count - 1}")
    if len(shares) != len(chosen) or not all(map(math.isfinite, shares)):
        raise ValueError(
            f"weights={shares} must be {len(chosen)} finite numbers, one for each of experts={chosen}"
        )
    return chosen, shares
