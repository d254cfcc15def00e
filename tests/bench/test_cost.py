"""The cost line, number by number, against sums written out by hand."""

import pytest

from adafuse.bench import cost
from adafuse.config import StrategyName
from synthetic.adapters import adapted, prompt
from synthetic.configurations import GEOMETRY, compose

BATCH, LENGTH, READ_GBPS = 3, 12, 1000.0


def by_hand(model) -> tuple[int, int]:
    """Bytes that a step of BATCH sequences reads of the backbone, and the products of one sequence's second step."""
    config, embedding = model.config, model.get_input_embeddings().weight
    head_dim = config.hidden_size // config.num_attention_heads
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding[BATCH:].nbytes)
    slot = 2 * config.num_key_value_heads * head_dim * embedding.element_size()
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name) + embedding.numel()
    # torch counts no attention on a CPU
    return weights + BATCH * LENGTH * config.num_hidden_layers * slot, linears


@pytest.mark.parametrize("tied", [False, True])
def test_the_line(tiny_llama, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    read, macs = by_hand(model)
    plain = cost.cost(model, None, StrategyName.dense, prompt(BATCH, LENGTH), READ_GBPS)
    assert plain["macs"] == macs and plain["adapter_params"] == 0
    assert plain["bytes_per_token"] == read / BATCH
    assert plain["floor_ms"] == pytest.approx(read / BATCH / READ_GBPS / 1e6)
    config = compose(*GEOMETRY, "method=adafuse")
    adapter = adapted(model, config)
    own = cost.cost(model, adapter, StrategyName.switch, prompt(1, LENGTH), READ_GBPS)
    router = adapter.token_router.weight
    experts = sum(p.numel() for p in adapter.parameters()) - router.numel()
    weights = sum(site.base.weight.nbytes for site in adapter.adapted().values())
    assert own["params"] == plain["params"] + own["adapter_params"]
    assert own["adapter_params"] == experts + router.numel()
    # two of four experts go in and two come out, and every adapted weight is read and written beside its product
    added = router.nbytes + 4 * experts + 2 * weights
    assert own["bytes_per_token"] == cost.backbone_bytes(model, prompt(1, LENGTH)) + added


def test_what_was_seen_of_the_experts_counts_for_those_alone_that_can_skip(tiny_llama) -> None:
    """A token that is left to the backbone: a switch does nothing for it, a merge layer by layer does not know."""
    config = compose(*GEOMETRY, "method=adafuse")
    adapter = adapted(tiny_llama(), config)
    seen = {"merged_share": 0.5, "used_share": 0.25, "touched_share": 0.75}

    def of(strategy: StrategyName, told: dict[str, float] | None) -> int:
        return cost.adapter_bytes(adapter, strategy, 1, told)

    router = adapter.token_router.weight
    experts = sum(p.nbytes for p in adapter.parameters()) - router.nbytes
    weights = sum(site.base.weight.nbytes for site in adapter.adapted().values())
    assert of(StrategyName.switch, seen) == router.nbytes + experts * 0.25 + 2 * weights * 0.5
    assert of(StrategyName.simple_merge, seen) == of(StrategyName.simple_merge, None)
    assert of(StrategyName.simple_merge, None) == router.nbytes + experts + 2 * weights
    assert of(StrategyName.gather, seen) == router.nbytes + experts * 0.75
    assert of(StrategyName.dense, seen) == router.nbytes + experts


def test_rebase_alone_holds_a_clean_copy_of_every_adapted_weight(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapted(model, compose(*GEOMETRY, "method=adafuse"))
    merged, rebased = (
        cost.weights_gib(model, adapter, own) for own in (StrategyName.switch, StrategyName.rebase)
    )
    weights = sum(site.base.weight.nbytes for site in adapter.adapted().values())
    assert rebased - merged == pytest.approx(weights / 2**30)
    laid_out = cost.weights_gib(model, adapter, StrategyName.gather) - merged
    assert laid_out == pytest.approx(
        sum(p.nbytes for lora in adapter.loras().values() for p in lora.parameters()) / 2**30
    )
