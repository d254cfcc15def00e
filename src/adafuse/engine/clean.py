"""Clean copies of the backbone's weights, one for all who have to put them back.

In: a weight that is clean now. Out: a copy that nobody writes to. Every merging strategy of a cell and every check
needs the weights as they were; with a copy each, four arms of a 7-billion backbone would need 54 GB for the same bytes.
Next: strategies/merge.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# by parameter, for as long as its backbone lives
_COPIES = WeakTensorKeyDictionary()


def clean_copy(weight: nn.Parameter) -> Tensor:
    """`weight` as it is now: the copy that is there already if it is the same bit for bit, else a new one."""
    kept = _COPIES.get(weight)
    if kept is None or kept.device != weight.device or not torch.equal(kept, weight):
        kept = weight.detach().clone()
        _COPIES[weight] = kept
    return kept
