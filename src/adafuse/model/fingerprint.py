"""Which backbone a model is, from its weights as they lie in memory, wherever they came from.

In: named parameters. Out: two digests of the names, the shapes and every number: the sum of all bit patterns of each
tensor, which no change of a single number leaves as it is, and evenly spaced numbers in their order. Numbers count as
rounded to bfloat16, once directly and once through float16, so that a backbone is the same one in every dtype that it
is cast to. config.json has no part in it. Next: adapters/store.py, which ties an adapter to its backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from adafuse.distributed import whole

SAMPLES = 65536
# numbers that are rounded at a time: a copy of a whole embedding would be a gigabyte
PART = 2**24
COVERS = "names, shapes and all numbers of the backbone's weights, rounded to bfloat16, directly and through float16"


ROUNDINGS = {"bfloat16": None, "float16": torch.float16}


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest for each of the two roundings."""
    return {name: _digest(weights, through) for name, through in ROUNDINGS.items()}


def is_of(saved: Collection[str], weights: Mapping[str, Tensor]) -> bool:
    """Whether these can be the weights of which `saved` are the digests, after casts; mostly one rounding tells."""
    return any(_digest(weights, through) in saved for through in ROUNDINGS.values())


@torch.no_grad()
def _digest(weights: Mapping[str, Tensor], through: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        flat = whole(weight).detach().reshape(-1)
        total = sum(int(_bits(part, through).sum(dtype=torch.int64)) for part in flat.split(PART))
        # an odd step: rows have even lengths, of which it would else meet the same columns only
        step = max(1, flat.numel() // SAMPLES) | 1
        digest.update(f"{name} {list(weight.shape)} {total} ".encode())
        digest.update(_bits(flat[::step], through).cpu().numpy().tobytes())
    return digest.hexdigest()


def _bits(numbers: Tensor, through: torch.dtype | None) -> Tensor:
    return numbers.to(through or numbers.dtype).to(torch.bfloat16).contiguous().view(torch.int16)
