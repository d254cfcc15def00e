"""A key-value cache of fixed size with one write position for all layers, so that a decode step can be captured.

transformers' own static cache keeps a counter in every layer and advances it there: at least two more tiny launches
per layer and token, for every arm. Here the decode loop owns the one position. In: keys and values of new tokens.
Out: all slots of the cache; the mask says which of them count. Next: graph.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SharedPositionCache(Cache):
    """`slots` holds the positions [S] at which the next forward writes; set it before a forward of S tokens."""

    # each pass over a prompt writes over the one before
    fixed = True
    # the last token's state, where a router reads it (adapters/previous.py); once there is one its address stays
    state_B1D: Tensor | None = None

    def __init__(self, depth: int, length: int) -> None:
        super().__init__(layers=[_Layer(self, length) for _ in range(depth)])
        self.slots = torch.empty(0, dtype=torch.int64)


class _Layer(CacheLayerMixin):
    """Keys and values [B, heads, length, head_dim] at addresses that never change."""

    def __init__(self, cache: SharedPositionCache, length: int) -> None:
        super().__init__()
        self.cache, self.length = cache, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.length, width)
        self.values = value_states.new_zeros(batch, heads, self.length, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.cache.slots, key_states)
        self.values.index_copy_(2, self.cache.slots, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError("the decode loop owns the position and passes position_ids")

    def get_max_length(self) -> int:
        return self.length

    # the name of get_max_length in older releases of transformers 5
    get_max_cache_shape = get_max_length
