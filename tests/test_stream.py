"""The copy and the read that calibrate: every element once, the last ones too."""

import pytest
import torch

from adafuse.kernels import stream

WHERE = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
]


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("count", [1, stream.BLOCKS[0], 2 * stream.BLOCKS[0] + 5])
def test_copy_writes_every_element_and_no_more(count: int, device: str) -> None:
    source = torch.randn(count, device=device)
    whole = torch.full((count + 8,), float("nan"), device=device)
    stream.copy_(whole[:count], source, stream.BLOCKS[0])
    assert torch.equal(whole[:count], source)
    assert bool(whole[count:].isnan().all())


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("count", [1, stream.BLOCKS[0], 2 * stream.BLOCKS[0] + 5])
def test_read_sums_every_element_once(count: int, device: str) -> None:
    # small integers: sums are exact in any order
    source = torch.randint(-8, 8, (count + 8,), device=device).float()
    sums = stream.read(source[:count], stream.BLOCKS[0])
    wanted = [float(part.sum()) for part in source[:count].split(stream.BLOCKS[0])]
    assert sums.tolist() == wanted
