"""Sliding windows and scaled RoPE in every runtime: the tokens that transformers' own `generate` finds."""

import pytest
import torch

from adafuse.adapters.reference import float_view
from adafuse.bench.checks import run_checks
from adafuse.config import Runtime, StrategyName
from adafuse.engine import decode
from adafuse.engine.make import make
from synthetic.adapters import adapted, prompt
from synthetic.configurations import GEOMETRY, compose

WINDOW, TOKENS = 16, 40
SLIDING = {"sliding_window": WINDOW}
MIXED = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}


def rope(rope_type: str, **fields: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **fields}}


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.0], "factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "mistral": ("mistral", SLIDING),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", SLIDING | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2, windows unused": ("qwen2", SLIDING),
    "qwen3, mixed": ("qwen3", SLIDING | MIXED | {"use_sliding_window": True, "head_dim": 8}),
    "qwen3, every block": (
        "qwen3",
        SLIDING | {"use_sliding_window": True, "max_window_layers": 0, "head_dim": 8},
    ),
    "linear": ("llama", rope("linear", factor=4.0)),
    "llama3": ("llama", rope("llama3", original_max_position_embeddings=32, **LLAMA3)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "dynamic, short": ("llama", rope("dynamic", factor=4.0)),
    "longrope, short": ("llama", rope("longrope", original_max_position_embeddings=128, **LONG)),
    "longrope, long": ("llama", rope("longrope", original_max_position_embeddings=8, **LONG)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_llama):
    model_type, changes = MODELS[request.param]
    return tiny_llama(model_type, **changes)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda runtime: runtime.name)
def test_a_runtime_decodes_what_transformers_does(runtime: Runtime, rows: int, model) -> None:
    as_generated(model, runtime, rows, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [Runtime.graph, Runtime.compiled], ids=lambda runtime: runtime.name)
def test_a_captured_step_decodes_what_transformers_does(runtime: Runtime, model) -> None:
    as_generated(model, runtime, 3, "cuda")


@pytest.mark.parametrize("name", ["mistral", "qwen3, mixed"])
def test_a_step_is_one_graph_for_torch_compile(
    name: str, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: compiler(step, backend="eager", **how))
    model_type, changes = MODELS[name]
    as_generated(tiny_llama(model_type, **changes), Runtime.compiled, 3, "cpu")


def as_generated(model, runtime: Runtime, rows: int, where: str) -> None:
    """Longer than the window, and in a batch behind padding of different lengths."""
    model.generation_config.eos_token_id = None
    model, ids = model.to(where), prompt(rows).to(where)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    want = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    decoder = make(model, None, StrategyName.dense, runtime, ids.shape[1] + TOKENS)
    with decoder.installed():
        token = decoder.start(ids, mask if rows > 1 else None).argmax(-1, keepdim=True)
        found = [ids, token]
        with decoder.decoding():
            for _ in range(TOKENS - 1):
                found.append(token := decoder.step(token).argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(found, dim=1), want)


def test_the_window_is_felt(tiny_llama) -> None:
    """Or the tests above could not fail: without it the same weights say something else."""
    near, far = (tiny_llama("mistral", sliding_window=window) for window in (WINDOW, None))
    ids = [decode.generate(one, None, prompt(), None, TOKENS) for one in (near, far)]
    assert not torch.equal(*ids)


@pytest.mark.parametrize("name", ["mistral", "qwen3, mixed", "longrope, long"])
@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda runtime: runtime.name)
def test_an_adapter_meets_its_checks(runtime: Runtime, name: str, tiny_llama) -> None:
    model_type, changes = MODELS[name]
    model = tiny_llama(model_type, **changes)
    adapter = adapted(model, compose(*GEOMETRY, "method=adafuse"))
    view = float_view(model)
    decoder = make(model, adapter, StrategyName.gather, runtime, 80)
    found = run_checks(decoder, view, prompt(2), TOKENS)
    assert found.passed, [check for check in found.checks if not check.passed]


def test_frequencies_follow_the_length_again_after_decoding(tiny_llama) -> None:
    model = tiny_llama(**rope("dynamic", factor=4.0))
    decoder = make(model, None, StrategyName.dense, Runtime.graph, 40)
    decoder.start(prompt())
    with decoder.decoding():
        decoder.run(4)
    assert model.model.rotary_emb.rope_type == "dynamic"
