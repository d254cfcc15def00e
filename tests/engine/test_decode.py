"""Greedy decoding agrees with transformers' own, stops where told, and padding never changes a row."""

import pytest
import torch

from adafuse import strategies
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.config import StrategyName
from adafuse.engine.decode import forward_logits, generate
from synthetic.configurations import GEOMETRY, compose

IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_plain_model_decodes_as_transformers_does(tiny_llama) -> None:
    model = tiny_llama()
    theirs = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    assert torch.equal(generate(model, None, IDS, None, 12), theirs)


def test_rows_of_different_length_decode_as_they_do_alone(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 1, scale=0.3)
    adapter.install(strategies.make(StrategyName.gather))
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    padded[0, :4], mask[0, :4] = 0, 0
    together = generate(model, adapter, padded, mask, 8)
    assert torch.equal(together[0, 4:], generate(model, adapter, IDS[:1, 4:], None, 8)[0])
    assert torch.equal(together[1], generate(model, adapter, IDS[1:], None, 8)[0])
    adapter.remove()


def test_right_padding_leaves_the_real_positions_alone(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse_layerwise")
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 1, scale=0.3)
    adapter.install(strategies.make(StrategyName.dense))
    padded = torch.cat([IDS, torch.zeros_like(IDS[:, :3])], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS[:, :3])], dim=1)
    torch.testing.assert_close(forward_logits(model, padded, mask)[:, :9], forward_logits(model, IDS))
    adapter.remove()


def test_stops_when_every_row_is_finished(tiny_llama) -> None:
    model = tiny_llama()
    seen = []

    def stop(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return torch.tensor([True, len(seen) >= 3])

    assert generate(model, None, IDS, None, 50, stop).shape[1] == IDS.shape[1] + 3


def test_an_error_in_a_decode_step_gives_the_weights_back(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    clean = {name: p.clone() for name, p in model.named_parameters()}
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 1, scale=0.3)
    adapter.install(strategies.make(StrategyName.switch))

    def stop(ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 12:
            raise RuntimeError("the caller gave up")
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(RuntimeError, match="gave up"):
        generate(model, adapter, IDS[:1], None, 9, stop)
    adapter.remove()
    assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())
