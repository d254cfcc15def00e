"""Which backbone a model is, from its weights as they lie in memory, wherever they came from.

In: named parameters. Out: two digests of the names, the shapes and every number: the sum of all bit patterns of each
tensor, which no change of a single number leaves as it is, and evenly spaced numbers in their order. Numbers count as
rounded to bfloat16, once directly and once through float16, so that a backbone is the same one in every dtype that it
is cast to. config.json has no part in it. Next: adapters/store.py, which ties an adapter to its backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SAMPLES = 65536
# numbers that are rounded at a time: a copy of a whole embedding would be a gigabyte
PART = 2**24
COVERS = "names, shapes and all numbers of the backbone's weights, rounded to bfloat16, directly and through float16"


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A digest for each of the two roundings; empty where some weights are not in memory (device_map with offload)."""
    found = sorted(weights, key=lambda pair: pair[0])
    if any(weight.is_meta for _, weight in found):
        return {}
    return {name: _digest(found, dtype) for name, dtype in (("bfloat16", None), ("float16", torch.float16))}


def is_same(saved: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether one can be the other after casts."""
    return not set(saved.values()).isdisjoint(now.values())


@torch.no_grad()
def _digest(weights: Iterable[tuple[str, Tensor]], through: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        total = sum(int(_bits(part, through).sum(dtype=torch.int64)) for part in flat.split(PART))
        # an odd step: rows have even lengths, of which it would else meet the same columns only
        step = max(1, flat.numel() // SAMPLES) | 1
        digest.update(f"{name} {list(weight.shape)} {total} ".encode())
        digest.update(_bits(flat[::step], through).cpu().numpy().tobytes())
    return digest.hexdigest()


def _bits(numbers: Tensor, through: torch.dtype | None) -> Tensor:
    return numbers.to(through or numbers.dtype).to(torch.bfloat16).contiguous().view(torch.int16)
