"""The copy, the read and the rewrite that calibrate: every element once, the last ones too; and launches of nothing."""

import pytest
import torch

from adafuse.kernels import stream
from adafuse.kernels.config import STREAM_BLOCKS

WHERE = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
]


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("count", [1, STREAM_BLOCKS[0], 2 * STREAM_BLOCKS[0] + 5])
def test_copy_writes_every_element_and_no_more(count: int, device: str) -> None:
    source = torch.randn(count, device=device)
    whole = torch.full((count + 8,), float("nan"), device=device)
    stream.copy_(whole[:count], source, STREAM_BLOCKS[0])
    assert torch.equal(whole[:count], source)
    assert bool(whole[count:].isnan().all())


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("count", [1, STREAM_BLOCKS[0], 2 * STREAM_BLOCKS[0] + 5])
def test_read_sums_every_element_once(count: int, device: str) -> None:
    # small integers: sums are exact in any order
    source = torch.randint(-8, 8, (count + 8,), device=device).float()
    sums = stream.read(source[:count], STREAM_BLOCKS[0])
    wanted = [float(part.sum()) for part in source[:count].split(STREAM_BLOCKS[0])]
    assert sums.tolist() == wanted


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, STREAM_BLOCKS[0], 2 * STREAM_BLOCKS[0] + 5])
def test_scale_rewrites_every_element_once_and_no_more(count: int, dtype: torch.dtype, device: str) -> None:
    whole = torch.randn(count + 8, device=device).to(dtype)
    wanted = torch.cat([-1.5 * whole[:count].float(), whole[count:].float()]).to(dtype)
    stream.scale_(whole[:count], -1.5, STREAM_BLOCKS[0])
    assert torch.equal(whole, wanted)


def test_a_wrong_factor_shows() -> None:
    values = torch.ones(STREAM_BLOCKS[0] + 5)
    stream.scale_(values, -1.5, STREAM_BLOCKS[0])
    assert not torch.equal(values, torch.full_like(values, 1.5))
    stream.scale_(values, -2.0, STREAM_BLOCKS[0])
    assert torch.equal(values, torch.full_like(values, 3.0)), "the factor of each call, compiled once"


@pytest.mark.parametrize("device", WHERE)
def test_tiny_adds_one_and_empty_adds_nothing(device: str) -> None:
    value = torch.tensor([2.0, 7.0], device=device)
    stream.empty(value)
    assert value.tolist() == [2.0, 7.0]
    stream.tiny_(value[:1])
    stream.tiny_(value[:1])
    assert value.tolist() == [4.0, 7.0]


@pytest.mark.gpu
def test_nodes_of_a_graph_depend_on_each_other() -> None:
    from adafuse.bench.device import captured

    value = torch.zeros(1, device="cuda")
    replay = captured(lambda: [stream.tiny_(value) for _ in range(50)])
    value.zero_()
    replay()
    replay()
    assert value.item() == 100
