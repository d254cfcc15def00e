"""Runtime lean: the same tokens and logits as transformers, for every family and method; off a GPU, interpreted."""

from dataclasses import replace

import pytest
import torch

from adafuse.adapters import gate_table, reference
from adafuse.bench.checks import Check, run_checks
from adafuse.config import GateSource, Runtime, StrategyName
from adafuse.engine.lean import Lean
from adafuse.engine.make import make
from adafuse.kernels import attend, beside, config, ends, lean
from adafuse.kernels.beside import DOWN
from adafuse.kernels.config import AttendCut, LeanCut
from synthetic import interpreter
from synthetic.adapters import adapted, prompt
from synthetic.configurations import GEOMETRY, compose

TOKENS = 8
SLIDING = {"sliding_window": 16}
QWEN = {"use_sliding_window": True, "max_window_layers": 1}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(rope_type: str, **fields: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **fields}}


MODELS = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("mistral", SLIDING),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, a window in one block": ("qwen2", SLIDING | QWEN),
    "qwen3": ("qwen3", {"head_dim": 12, "num_key_value_heads": 1}),
    "linear": ("llama", rope("linear", factor=4.0)),
    "llama3": ("llama", rope("llama3", **LLAMA3)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
}
ARMS = {
    "adafuse": ("gather", ["method=adafuse"]),
    "adafuse, from the embedding": ("gather", ["method=adafuse", "method.router_input=embedding"]),
    "adafuse, after block 0": ("gather", ["method=adafuse", "method.router_input=block0_output"]),
    "adafuse, late and few": (
        "gather",
        ["method=adafuse", "method.first_expert_block=1", "experts.targets=[o_proj,up_proj]"],
    ),
    "adafuse, a decision a block": (
        "gather",
        ["method=adafuse", "method.blocks_per_decision=1", "arms.run=[adafuse_gather_lean]"],
    ),
    "adafuse, null expert": (
        "gather",
        ["method=adafuse", "method.null_expert=true", "method.bypass_penalty=0.1", "method.router_norm=true"],
    ),
    "adafuse, raw": (
        "gather",
        ["method=adafuse", "method.normalisation=softmax_topk_raw", "experts.top_k=3"],
    ),
    "adafuse_layerwise": ("gather", ["method=adafuse_layerwise", "experts.top_k=1"]),
    "mola": ("gather", ["method=mola", "method.experts_by_quarter=[2,2,3,4]"]),
    "moral": ("gather", ["method=moral"]),
    "pesc": ("gather", ["method=pesc", "method.bottleneck_dim=6"]),
    "mixlora": ("gather", ["method=mixlora"]),
    "lora": ("gather", ["method=lora", "method.rank=20"]),
    "switch": ("switch", ["method=adafuse"]),
    "rebase": ("rebase", ["method=adafuse", "method.router_input=embedding"]),
    "lora, merged": ("rebase", ["method=lora"]),
}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles: the interpreter takes its time by the program. And memory that nobody wrote is NaN."""
    if torch.cuda.is_available():
        return

    def cut(tokens: int, inputs: int, outputs: int, gated: bool, experts: bool) -> LeanCut:
        return LeanCut(rows=256, block=64, warps=4, stages=2, front_rows=64)

    monkeypatch.setattr(lean, "lean_cut", cut)
    fresh = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        made = fresh(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def tiny(tiny_llama, name: str = "llama", **changes: object):
    """On a GPU a product needs 16 inputs and outputs at least, which these have."""
    model_type, own = MODELS[name]
    model = tiny_llama(model_type, **({"num_hidden_layers": 2} | own | changes))
    model.generation_config.eos_token_id = None
    return model.to(device())


def padded(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts behind padding of different lengths."""
    ids = prompt(rows).to(device())
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids, mask


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_decodes_what_transformers_does(name: str, rows: int, tiny_llama) -> None:
    """Longer than the window, and in a batch behind padding; the logits too, on the same tokens."""
    model, (ids, mask) = tiny(tiny_llama, name), padded(rows)
    given = {
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want = model.generate(input_ids=ids, attention_mask=mask, **given)
    decoder = make(model, None, StrategyName.dense, Runtime.lean, ids.shape[1] + TOKENS)
    with decoder.installed():
        decoder.start(ids, mask if rows > 1 else None)
        with decoder.decoding():
            for step, token in enumerate(want.sequences[:, ids.shape[1] : -1].split(1, dim=1)):
                got = decoder.step(token)
                assert torch.allclose(
                    got, want.logits[step + 1], atol=1e-4 * float(want.logits[0].abs().max())
                )
                assert torch.equal(decoder.token_B1, want.sequences[:, ids.shape[1] + step + 1, None])


def checked(model, arm: str, rows: int, tokens: int = 4) -> dict[str, Check]:
    strategy, overrides = ARMS[arm]
    adapter = adapted(model, compose(*GEOMETRY, *overrides))
    decoder = make(model, adapter, StrategyName[strategy], Runtime.lean, 12 + tokens + 8)
    found = run_checks(decoder, reference.float_view(model), prompt(rows).to(model.device), tokens)
    return {check.check: check for check in found.checks}


@pytest.mark.parametrize(
    ("arm", "rows"),
    [
        *((arm, 1) for arm in ARMS),
        *((arm, 3) for arm in ("adafuse, null expert", "adafuse_layerwise", "pesc", "mixlora", "lora")),
    ],
)
def test_every_arm_passes_every_check(arm: str, rows: int, tiny_llama) -> None:
    """With few tokens and with tensor cores."""
    found = checked(tiny(tiny_llama), arm, rows)
    assert all(check.passed for check in found.values()), [c for c in found.values() if not c.passed]
    assert ("routing_logits" in found) == (not arm.startswith("lora"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="programs run at once there")
@pytest.mark.parametrize("arm", ["adafuse, null expert", "adafuse, raw", "mola", "pesc", "mixlora", "lora"])
def test_every_wait_ends_and_takes_nothing_of_the_step_before(
    arm: str, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter.bound(monkeypatch, lean, "product_kernel")
    interpreter.late(monkeypatch, lean, "product_kernel")
    found = checked(tiny(tiny_llama), arm, 2)
    assert all(check.passed for check in found.values()), [c for c in found.values() if not c.passed]


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches overlap there, test_lean_gpu.py")
@pytest.mark.parametrize(
    ("arm", "rows"),
    [
        *(
            (arm, 1)
            for arm in ("adafuse, after block 0", "adafuse, a decision a block", "mola", "mixlora", "lora")
        ),
        *((arm, 3) for arm in ("adafuse, late and few", "pesc", "mixlora")),
    ],
)
def test_nothing_is_read_early_that_may_still_be_written(
    arm: str, rows: int, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter.overlapping(monkeypatch, (lean, beside, attend, ends))
    found = checked(tiny(tiny_llama), arm, rows)
    assert all(check.passed for check in found.values()), [c for c in found.values() if not c.passed]


@pytest.mark.parametrize("name", ["qwen3", "qwen2, a window in one block"])
def test_experts_beside_other_families(name: str, tiny_llama) -> None:
    found = checked(tiny(tiny_llama, name), "adafuse", 1)
    assert all(check.passed for check in found.values()), [c for c in found.values() if not c.passed]


@pytest.mark.parametrize("arm", ["adafuse", "adafuse_layerwise"])
def test_a_step_without_its_experts_is_found(arm: str, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    product = lean.product
    halved = lambda work: replace(work.beside, scaling=work.beside.scaling / 2)  # noqa: E731
    monkeypatch.setattr(
        "adafuse.engine.lean.product",
        lambda work: product(replace(work, beside=halved(work)) if work.beside else work),
    )
    found = checked(tiny(tiny_llama), arm, 1)
    assert not found["logits"].passed and not found["greedy"].passed


def test_a_token_that_reads_one_slot_too_few_is_found(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = attend.attend
    monkeypatch.setattr(
        "adafuse.engine.lean.attend", lambda work: launch(replace(work, pads_B=work.pads_B + 1))
    )
    found = checked(tiny(tiny_llama), "adafuse", 1)
    assert not found["logits"].passed


def decoded(decoder: Lean, rows: int = 1, count: int = 4) -> torch.Tensor:
    with decoder.installed():
        decoder.start(prompt(rows).to(device()))
        with decoder.decoding():
            return decoder.run(count).clone()


def test_a_gate_of_all_layers_adds_one_launch_a_token_and_a_router_per_linear_none(
    tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the runtime is for: five launches a layer, embedding, head and next token."""
    launched: list[str] = []
    for name in ("product", "attend", "embed", "decide", "choose_next"):
        own = {"product": lean, "attend": attend}.get(name, ends)
        launch = getattr(own, name)
        monkeypatch.setattr(
            f"adafuse.engine.lean.{name}", lambda *work, n=name, go=launch: (launched.append(n), go(*work))
        )
    counts = {}
    for arm in ("base", "adafuse", "adafuse, a decision a block", "adafuse_layerwise", "pesc"):
        model = tiny(tiny_llama)
        adapter = None if arm == "base" else adapted(model, compose(*GEOMETRY, *ARMS[arm][1]))
        strategy = StrategyName.dense if arm == "base" else StrategyName.gather
        launched.clear()
        decoder = make(model, adapter, strategy, Runtime.lean, 40)
        if not torch.cuda.is_available():
            decoded(decoder, count=1)
            counts[arm] = len(launched)
    base = 5 * 2 + 3
    assert not counts or counts == {
        "base": base, "adafuse": base + 1, "adafuse, a decision a block": base + 2, "adafuse_layerwise": base,
        "pesc": base + 2,
    }  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
def test_a_table_of_gates_is_followed(raw: bool, tiny_llama) -> None:
    model = tiny(tiny_llama)
    kind = ["method.normalisation=softmax_topk_raw"] if raw else []
    adapter = adapted(model, compose(*GEOMETRY, "method=adafuse", *kind))
    table = gate_table.make(GateSource.uniform, adapter.geometry, 3, 0, device())
    adapter.context.gate_table = table
    decoder = make(model, adapter, StrategyName.gather, Runtime.lean, 40)
    found = run_checks(decoder, reference.float_view(model), prompt(3).to(device()), 5)
    assert found.passed, [check for check in found.checks if not check.passed]
    # the padded way took rows as well, and those of the first are the ones that were chosen
    assert torch.equal(found.choices["token"], table.index_NBK[:4].transpose(0, 1))
    assert int(table.step) == 4 + 3


def test_replaced_weights_are_noticed_and_new_factors_are_taken(tiny_llama) -> None:
    model = tiny(tiny_llama)
    adapter = adapted(model, compose(*GEOMETRY, "method=adafuse"))
    decoder = make(model, adapter, StrategyName.gather, Runtime.lean, 40)
    first = decoded(decoder)
    for parameter in adapter.parameters():
        parameter.data.mul_(-3.0)
    changed = decoded(decoder)
    assert not torch.equal(first, changed)
    fresh = make(model, adapter, StrategyName.gather, Runtime.lean, 40)
    assert torch.equal(decoded(fresh), changed)
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight = torch.nn.Parameter(norm.weight * 2, requires_grad=False)
    with pytest.raises(AssertionError, match="weights moved since the step was captured"):
        decoded(decoder)


@pytest.mark.parametrize("arm", ["adafuse", "adafuse_layerwise"])
def test_a_step_that_was_broken_off_leaves_no_flag(
    arm: str, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next prompt's first token would take what that step shrank, where programs run at once."""
    model = tiny(tiny_llama)
    adapter = adapted(model, compose(*GEOMETRY, *ARMS[arm][1]))
    decoder = make(model, adapter, StrategyName.gather, Runtime.lean, 40)
    monkeypatch.setattr("adafuse.engine.lean.choose_next", lambda work: 1 / 0)
    with decoder.installed():
        decoder.start(prompt().to(device()))
        with pytest.raises(ZeroDivisionError), decoder.decoding():
            decoder.run(1)
        assert isinstance(decoder, Lean) and decoder._plan is not None
        flags = decoder._plan.next.flags
        assert (flags != DOWN).any()
        decoder.start(prompt().to(device()))
    assert (flags == DOWN).all()


def test_draws_follow_their_seed_and_end_with_it(tiny_llama) -> None:
    model = tiny(tiny_llama)
    decoder = make(model, None, StrategyName.dense, Runtime.lean, 60)
    greedy, found = decoded(decoder), []
    for seed in (1, 2, 1):
        decoder.again(prompt().to(device()))
        with decoder.decoding(), decoder.sampling(3.0, seed):
            found.append(decoder.run(4).clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(decoded(decoder), greedy)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", rope("dynamic", factor=4.0), "rope_type=dynamic.*use runtime=graph"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu.*use runtime=graph"),
    ],
)
def test_models_that_it_cannot_run_are_refused(name: str, changes: dict, message: str, tiny_llama) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny(tiny_llama, name, **changes), None, StrategyName.dense, Runtime.lean, 40)


def test_a_batch_that_is_too_large_is_refused(tiny_llama) -> None:
    decoder = make(tiny(tiny_llama), None, StrategyName.dense, Runtime.lean, 40)
    with pytest.raises(ValueError, match="batch=65 exceeds the 64 rows.*use graph"):
        decoder.start(prompt(65).to(device()))


def test_a_long_context_is_cut_into_parts(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions at which one part becomes two and three, replayed with the launches of the first."""
    monkeypatch.setattr(
        "adafuse.engine.lean.attend_cut", lambda *_: AttendCut(block=16, splits=3, least=16, warps=1)
    )
    model = tiny(tiny_llama)
    ids = prompt().to(device())
    want = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=31, do_sample=False
    )
    decoder = make(model, None, StrategyName.dense, Runtime.lean, 60)
    assert torch.equal(decoded(decoder, count=30), want[:, 13:])
    assert config.attend_cut(1, 4, 8192).splits == 64
