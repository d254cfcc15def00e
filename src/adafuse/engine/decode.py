"""The decode loop: prefill, one token, n tokens, and greedy generation; the same functions are evaluated and timed.

In: a model (with an installed `Adapter`, or without), token ids [B, S], a mask [B, S] of ones and zeros or None.
Out: logits or ids. Nothing is sampled: the largest logit wins. Next: strategies/, evaluation/harness.py, bench/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.forward import Strategy
from adafuse.adapters.router import Gates, Router


@torch.no_grad()
def forward_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, S, V] of whole sequences (no cache, unmerged): training, log-likelihoods, prefill."""
    kwargs = _positions(attention_mask)
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits


@torch.no_grad()
def prefill(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: DynamicCache
) -> Tensor:
    """Fill `cache` with the prompt; logits [B, V] after its last token."""
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **_positions(attention_mask),
    )
    return out.logits[:, -1]


@torch.no_grad()
def decode_one_token(
    model: nn.Module, token: Tensor, attention_mask: Tensor | None, cache: DynamicCache
) -> Tensor:
    """Feed `token` [B, 1]; logits [B, V] of the next one. `attention_mask` [B, past + 1] includes this token."""
    kwargs = {}
    if attention_mask is not None:
        kwargs["position_ids"] = attention_mask.sum(-1, keepdim=True) - 1
    out = model(
        input_ids=token, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **kwargs
    )
    return out.logits[:, -1]


def decode_n_tokens(model: nn.Module, token: Tensor, count: int, cache: DynamicCache) -> Tensor:
    """Greedy ids [B, count] after `token` [B, 1], unpadded; the loop that is timed. Call inside `decoding`."""
    ids = []
    for _ in range(count):
        token = decode_one_token(model, token, None, cache).argmax(-1, keepdim=True)
        ids.append(token)
    return torch.cat(ids, dim=1)


def installed(adapter: Adapter | None, strategy: Strategy | None) -> AbstractContextManager[None]:
    """The adapter in its model, ready to decode, or for whole sequences alone; the plain backbone is so always."""
    return nullcontext() if adapter is None else adapter.installing(strategy)


def collecting(adapter: Adapter | None) -> AbstractContextManager[list[tuple[Router, Gates]]]:
    """Whatever routers say inside; the plain backbone has none."""
    return nullcontext([]) if adapter is None else adapter.collecting()


@contextmanager
def decoding(adapter: Adapter | None) -> Iterator[None]:
    """Where decode steps may merge; the plain backbone needs nothing. Whoever decodes inside says so (`launched`): at
    the end a table of gates must have given a row to each of these tokens and to no other.
    """
    if adapter is None:
        yield
        return
    table = adapter.context.gate_table
    with adapter.decoding(), nullcontext() if table is None else table.counting():
        yield


def launched(adapter: Adapter | None, count: int) -> None:
    """`count` decode steps were launched, of one token for each sequence."""
    if adapter is not None and adapter.context.gate_table is not None:
        adapter.context.gate_table.launched += count


@torch.no_grad()
def generate(
    model: nn.Module,
    adapter: Adapter | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    stop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Greedy continuation, [B, S + n] with n <= max_new_tokens; padding goes on the left.

    `stop` sees all ids so far, [B, S + n], and says which rows [B] are finished. Prefill is unmerged; decode steps go
    through the installed adapter's strategy.
    """
    if max_new_tokens < 1:
        return input_ids
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    cache, ids = DynamicCache(), input_ids
    token = prefill(model, input_ids, attention_mask, cache).argmax(-1, keepdim=True)
    with decoding(adapter):
        for step in range(max_new_tokens):
            ids = torch.cat([ids, token], dim=1)
            if step + 1 == max_new_tokens or (stop is not None and bool(stop(ids).all())):
                break
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
            token = decode_one_token(model, token, attention_mask, cache).argmax(-1, keepdim=True)
            launched(adapter, 1)
    return ids


def _positions(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Positions that skip left padding; transformers would count it otherwise."""
    if attention_mask is None:
        return {}
    return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
