"""Arguments of kernels/fused.py and how near naive.py it must come: odd sizes, strided x, columns without experts."""

import pytest
import torch
from torch import Tensor

from adafuse.kernels.config import Members

EXPERTS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled here, and need CUDA tensors")
MACHINES = [
    pytest.param("cpu", torch.float32, marks=INTERPRETED),
    pytest.param("cpu", torch.float16, marks=INTERPRETED),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]
# tokens, top-k, rank, inputs, outputs; then the first column and width of each member
CASES = [
    pytest.param(1, 2, 4, 256, 64, [(0, 32), (32, 16), (48, 16)], id="q,k,v"),
    pytest.param(2, 2, 8, 640, 96, [(0, 32), (64, 32)], id="q,v of q,k,v"),
    pytest.param(2, 3, 5, 300, 7, [(0, 7)], id="odd"),
    pytest.param(1, 1, 12, 2050, 24, [(0, 8), (8, 16)], id="gate,up"),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory holds NaN, so that what a kernel reads before or leaves without a write is seen."""
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: fresh(*size, **kind).fill_(float("nan")))


def problem(
    device: str, dtype: torch.dtype, tokens, top_k, rank, in_features, out_features, members: Members
) -> dict[str, object]:
    """Arguments of naive.fused; x is a slice of wider rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    chosen = [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)]
    return {
        "x_TI": normal(tokens, in_features + 16)[:, :in_features],
        "weight_OI": normal(out_features, in_features),
        # large enough that its absence is no matter of rounding
        "bias_O": 16 * normal(out_features),
        "lora_A_ECI": normal(EXPERTS, len(members) * rank, in_features) * 0.25,
        "lora_B_EOR": normal(EXPERTS, sum(width for _, width in members), rank) * 0.25,
        "index_TK": torch.stack(chosen).to(device),
        "weight_TK": torch.rand(tokens, top_k, generator=generator).to(device),
        "members": members,
        "scaling": 2.0,
    }


def flags_of(x: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=x.device)


def agrees(got: Tensor, want: Tensor) -> bool:
    """Whether two roundings of the same sums: half a unit each, and one for the order of the fp32 sums.

    In units of the largest value, since what cancels in a sum keeps the error of its terms; fp32 gets the 32 units
    that thousands of terms added in another order come to.
    """
    units = 32 if got.dtype == torch.float32 else 2
    return bool(
        (got.float() - want.float()).abs().max() <= units * torch.finfo(got.dtype).eps * want.abs().max()
    )
