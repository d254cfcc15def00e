"""A decode loop with its state, one class per way of launching: what is checked and what is timed is the same object.

In: a model, its adapter (or None), a strategy, a length. Out: logits step by step, or a whole block of tokens at once.
`Eager` is transformers' own loop; graph.py holds the static ones, peft.py runs PEFT's modules. Use: within
`installed()` call `start` (prefill), then within `decoding()` `step` or `run`. Next: graph.py; make.py chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adafuse import strategies
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates, Router
from adafuse.config import StrategyName
from adafuse.engine.decode import decode_n_tokens, decode_one_token, decoding, installed, launched, prefill


class Decoder(Protocol):
    """Shapes: B sequences, S tokens of a prompt (padding on the left), V words, K chosen experts."""

    model: nn.Module
    adapter: Adapter | None
    strategy: StrategyName
    # whatever routers said of the last step, where it is watched; a captured step writes it anew
    said: list[tuple[Router, Gates]]

    def installed(self) -> AbstractContextManager[None]: ...  # the adapter is in the model
    def start(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor: ...  # logits [B, V]
    def again(self, ids_BS: Tensor) -> None: ...  # back to the end of this prompt, which was started before
    def decoding(self) -> AbstractContextManager[None]: ...  # decode steps happen inside
    def step(self, token_B1: Tensor) -> Tensor: ...  # logits [B, V]
    def run(self, count: int) -> Tensor: ...  # greedy ids [B, count] after the last token
    def watching(self) -> AbstractContextManager[None]: ...  # so that `choices` can be asked
    def choices(self) -> dict[str, Tensor]: ...  # by router, its [B, S, K] of the last start or step


class Eager:
    """transformers' forward and its growing cache, launched operation by operation."""

    def __init__(self, model: nn.Module, adapter: Adapter | None, strategy: StrategyName) -> None:
        self.model, self.adapter, self.strategy = model, adapter, strategy
        self._watched = False
        self._choices: dict[str, Tensor] = {}
        self.said: list[tuple[Router, Gates]] = []

    def installed(self) -> AbstractContextManager[None]:
        return installed(self.adapter, strategies.make(self.strategy))

    def start(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        self._cache, self._mask = DynamicCache(), mask_BS
        with self._watch(len(ids_BS)):
            logits_BV = prefill(self.model, ids_BS, mask_BS, self._cache)
        self._token = logits_BV.argmax(-1, keepdim=True)
        return logits_BV

    def again(self, ids_BS: Tensor) -> None:
        self.start(ids_BS)

    def decoding(self) -> AbstractContextManager[None]:
        return decoding(self.adapter)

    def step(self, token_B1: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(token_B1)], dim=1)
        with self._watch(len(token_B1)):
            return self._one_token(token_B1)

    def run(self, count: int) -> Tensor:
        """Unpadded prompts only."""
        launched(self.adapter, count)
        ids_BN = decode_n_tokens(self.model, self._token, count, self._cache)
        self._token = ids_BN[:, -1:]
        return ids_BN

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def choices(self) -> dict[str, Tensor]:
        return self._choices

    def _one_token(self, token_B1: Tensor) -> Tensor:
        launched(self.adapter, 1)
        return decode_one_token(self.model, token_B1, self._mask, self._cache)

    @contextmanager
    def _watch(self, rows: int) -> Iterator[None]:
        """Note what the routers say in one forward of `rows` sequences, if anybody watches."""
        if self.adapter is None or not self._watched:
            yield
            return
        with self.adapter.collecting() as self.said:
            yield
        self._choices = self.adapter.by_name(self.said, rows)
