"""Clean copies of the backbone's weights, one for all who have to put them back.

In: a weight that is clean now. Out: a copy that nobody writes to. Every merging strategy of a cell and every check
needs the weights as they were; with a copy each, four arms of a 7-billion backbone would need 54 GB for the same bytes.
Next: strategies/merge.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# by parameter, for as long as its backbone lives
_COPIES = WeakTensorKeyDictionary()
_ON_HOST: ContextVar[bool] = ContextVar("clean copies in host memory", default=False)


def clean_copy(weight: nn.Parameter, read_by_kernels: bool = False) -> Tensor:
    """`weight` as it is now: the copy that is there already if it is the same bit for bit, else a new one.

    On the weight's device, unless `kept_on_host` says otherwise of copies that no kernel reads.
    """
    where = torch.device("cpu") if _ON_HOST.get() and not read_by_kernels else weight.device
    kept = _COPIES.get(weight)
    if kept is None or kept.device != where or not torch.equal(kept, weight.detach().to(where)):
        kept = weight.detach().to(where, copy=True)
        _COPIES[weight] = kept
    return kept


@contextmanager
def kept_on_host() -> Iterator[None]:
    """Copies that only serve to put weights back stay in host memory: whoever deploys the arm would not hold them on
    the device, so they must not count in its peak.
    """
    token = _ON_HOST.set(True)
    try:
        yield
    finally:
        _ON_HOST.reset(token)
