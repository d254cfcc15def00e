"""What a script of ten lines relies on: tokens of every strategy, ours and transformers', equal an independent loop;
the backbone comes back bit for bit; what cannot be is one line.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, pipeline

import adafuse
from adafuse.adapters import reference
from adafuse.adapters.adapter import randomise
from adafuse.bench import device
from adafuse.cell import content_hash
from adafuse.model.backbone import byte_tokenizer
from adafuse.strategies.merge import Switch
from synthetic import loras
from synthetic.checkpoints import save, tiny_model

SMALL = {"rank": 4, "experts": 4, "alpha": 8.0}
TOKENS = 8
END = 2
PROMPT = torch.randint(4, 260, (1, 12), generator=torch.Generator().manual_seed(3))
ITEMS = [{"prompt": f"{word}>", "answer": word} for word in ("abc", "bca", "cab", "acb")] * 4
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def adapted(method: str = "adafuse", model: Any = None, **options: Any) -> adafuse.Adapted:
    """With experts that do something, which a fresh adapter's do not."""
    small = {"tokenizer": byte_tokenizer(), "rank": 4} | (SMALL if method != "lora" else {})
    made = adafuse.attach(model or tiny_model(), method, **small | options)
    made.train()
    randomise(made.adapter, seed=1, scale=0.3)
    return made.eval()


def greedy(made: adafuse.Adapted, prompt: torch.Tensor, count: int = TOKENS) -> torch.Tensor:
    """Whole forwards of the fp32 reference, and its largest logit: no cache, no strategy, none of our layers."""
    with made.disable_adapter() as model:
        oracle = reference.Reference(reference.float_view(model), made.adapter)
        ids = prompt
        for _ in range(count):
            ids = torch.cat([ids, oracle(ids)[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == END:
                break
    return ids


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def test_a_dtype_of_auto_is_the_usual_one(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "checkpoint")
    assert adafuse.load(folder, dtype="auto").model.dtype == adafuse.load(folder).model.dtype


CASES = [
    *(
        ("adafuse", s)
        for s in ("gather", "dense", "loop", "masked_loop", "fused", "switch", "rebase", "simple_merge")
    ),
    *(("mola", s) for s in ("gather", "simple_merge")),
    *(("lora", s) for s in ("gather", "switch")),
    ("pesc", "gather"),
    ("mixlora", "loop"),
    ("adafuse_layerwise", "dense"),
]


@pytest.mark.parametrize(("method", "strategy"), CASES, ids="-".join)
def test_all_ways_to_generate_give_the_tokens_of_the_reference(method: str, strategy: str) -> None:
    made = adapted(method)
    want, clean = greedy(made, PROMPT), weights(made.model)
    assert torch.equal(made.generate(PROMPT, strategy=strategy, max_new_tokens=TOKENS), want)
    made.use(strategy)
    assert (made.strategy, made.runtime) == (strategy, "eager")
    plain = {"max_new_tokens": TOKENS, "do_sample": False}
    assert torch.equal(made.model.generate(PROMPT, **plain), want)
    assert torch.equal(made.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **plain), want)
    assert torch.equal(by_hand(made, PROMPT), want)
    assert same(made.model, clean)


def by_hand(made: adafuse.Adapted, ids: torch.Tensor) -> torch.Tensor:
    """The loop that people write themselves."""
    cache, new = DynamicCache(), ids
    for _ in range(TOKENS):
        with torch.no_grad():
            new = made(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_families_and_tied_embeddings(kind: str) -> None:
    made = adapted(model=tiny_model(kind, tie_word_embeddings=True))
    want = greedy(made, PROMPT)
    for strategy in ("gather", "switch"):
        made.use(strategy)
        assert torch.equal(made.generate(PROMPT, max_new_tokens=TOKENS), want)
        assert torch.equal(made.model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False), want)


def test_transformers_decodes_by_the_strategy_and_not_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch for every token but the prompt's, as in our own loop."""
    made, switched = adapted().use("switch"), []
    decide = Switch.decide
    monkeypatch.setattr(Switch, "decide", lambda self, gates: (switched.append(1), decide(self, gates))[1])
    made.model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)
    theirs = len(switched)
    made.generate(PROMPT, max_new_tokens=TOKENS)
    assert theirs == len(switched) - theirs == TOKENS - 1


@pytest.mark.parametrize("inner", [False, True], ids=["adapted", "its model"])
def test_a_pipeline_writes_what_we_write(inner: bool) -> None:
    made = adapted().use("rebase")
    pipe = pipeline("text-generation", model=made.model if inner else made, tokenizer=made.tokenizer)
    said = pipe("Sort: cab", max_new_tokens=TOKENS, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"] == made.generate("Sort: cab", max_new_tokens=TOKENS)


@pytest.mark.parametrize("strategy", ["gather", "dense"])
def test_beams_of_transformers_are_those_of_the_unmerged_form(strategy: str) -> None:
    made, options = adapted().use(strategy), {"num_beams": 3, "do_sample": False, "max_new_tokens": TOKENS}
    theirs = made.generate(input_ids=PROMPT, **options)
    made.train()  # no strategy at all
    made.model.eval()
    assert torch.equal(made.model.generate(PROMPT, **options), theirs)


REFUSED = {
    "num_beams": ("switch", {"num_beams": 2}),
    "num_return_sequences": ("rebase", {"num_return_sequences": 2, "do_sample": True}),
    "a batch of 2": ("simple_merge", {"input_ids": PROMPT.repeat(2, 1)}),
    "prompt_lookup_num_tokens": ("gather", {"prompt_lookup_num_tokens": 3}),
    "use_cache=False": ("gather", {"use_cache": False}),
    "a static cache": ("gather", {"cache_implementation": "static"}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_transformers_is_refused_what_a_strategy_cannot_do(said: str) -> None:
    made, clean = adapted(), None
    strategy, options = REFUSED[said]
    made.use(strategy)
    clean = weights(made.model)
    with pytest.raises(ValueError, match=said) as refusal:
        made.model.generate(**{"input_ids": PROMPT, "max_new_tokens": 4} | options)
    assert "\n" not in str(refusal.value)
    assert same(made.model, clean)


def test_an_error_in_the_middle_leaves_clean_weights() -> None:
    made = adapted().use("switch")
    clean = weights(made.model)

    def failing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 14:
            raise RuntimeError("in the middle")
        return scores

    with pytest.raises(RuntimeError, match="in the middle"):
        made.model.generate(PROMPT, max_new_tokens=8, logits_processor=LogitsProcessorList([failing]))
    assert same(made.model, clean)
    assert torch.equal(
        made.model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False), greedy(made, PROMPT)
    )


def test_static_runtimes_decode_alike_and_transformers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a GPU they run the step that they would capture; the second call goes on with the same decoder."""
    monkeypatch.setattr("adafuse.adapted.refuse_use", lambda *_: None)
    made = adapted().use("gather", runtime="graph")
    assert torch.equal(made.generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))
    kept = made._kept
    assert torch.equal(made.generate(PROMPT[:, :9], max_new_tokens=TOKENS), greedy(made, PROMPT[:, :9]))
    assert made._kept is kept
    assert torch.equal(made.generate(PROMPT, strategy="switch", max_new_tokens=TOKENS), greedy(made, PROMPT))
    assert made.generate(["ab", "Sort: cab"]) == [
        made.generate(text, runtime="eager") for text in ("ab", "Sort: cab")
    ]
    with pytest.raises(ValueError, match="runtime=graph is chosen"):
        made.model.generate(PROMPT)


def test_prompts_of_unequal_length_are_answered_as_if_alone() -> None:
    made, texts = adapted(), ["ab", "Sort: cab", "a longer prompt than both"]
    assert made.generate(texts, max_new_tokens=12) == [
        made.generate(text, max_new_tokens=12) for text in texts
    ]
    batch = made.tokenizer(texts, return_tensors="pt", padding=True)
    ours = made.generate(batch, max_new_tokens=TOKENS)
    assert torch.equal(ours, made.model.generate(**batch, max_new_tokens=TOKENS, do_sample=False))


def test_a_chat_is_written_by_its_template() -> None:
    made, chat = adapted(), [{"role": "user", "content": "cab"}]
    with pytest.raises(ValueError, match="no chat template"):
        made.generate(chat)
    made.tokenizer.chat_template = CHAT
    alone = made.generate(chat, max_new_tokens=TOKENS)
    assert alone == made.generate("<user>cab\n<assistant>", max_new_tokens=TOKENS)
    assert made.generate([chat, chat], max_new_tokens=TOKENS) == [alone, alone]
    for template in ("{{ raise_exception('roles must alternate') }}", "{% if x %}"):
        made.tokenizer.chat_template = template
        with pytest.raises(
            ValueError, match="the chat template does not take this chat: .*(alternate|Unexpected)"
        ):
            made.generate(chat)


def test_what_transformers_would_apply_to_logits_is_said(recwarn: pytest.WarningsRecorder) -> None:
    made = adapted()
    made.model.generation_config.update(repetition_penalty=1.0, do_sample=True, no_repeat_ngram_size=0)
    text = made.generate("Sort: cab", max_new_tokens=TOKENS)
    assert not recwarn.list
    made.model.generation_config.repetition_penalty = 1.3
    with pytest.warns(UserWarning, match="repetition_penalty=1.3, which this generate leaves alone"):
        assert made.generate("Sort: cab", max_new_tokens=TOKENS) == text


def test_a_row_ends_at_the_models_end_and_before_a_stop_text() -> None:
    made = adapted()
    whole = made.generate("Sort: cab", max_new_tokens=12)
    end = made.tokenizer(whole).input_ids[4]
    made.model.generation_config.eos_token_id = [2, end]
    ids = torch.tensor([made.tokenizer("Sort: cab").input_ids])
    ended = made.generate(ids, max_new_tokens=12)
    assert torch.equal(ended, made.model.generate(ids, max_new_tokens=12, do_sample=False))
    assert ended.shape[1] == ids.shape[1] + made.tokenizer(whole).input_ids.index(end) + 1
    made.model.generation_config.eos_token_id = 2
    for stop in (whole[3:5], ["\0nowhere", whole[3:5]]):
        assert made.generate("Sort: cab", max_new_tokens=12, stop=stop) == whole[: whole.index(whole[3:5])]


def test_a_stream_is_the_text_in_pieces() -> None:
    made = adapted().use("switch")
    clean, whole = weights(made.model), made.generate("Sort: cab", max_new_tokens=24)
    pieces = list(made.generate("Sort: cab", max_new_tokens=24, stream=True))
    assert len(pieces) > 5 and "".join(pieces) == whole
    stop = whole[5:8]
    cut = made.generate("Sort: cab", max_new_tokens=24, stop=stop)
    assert "".join(made.generate("Sort: cab", max_new_tokens=24, stop=stop, stream=True)) == cut
    stream = made.generate("Sort: cab", max_new_tokens=24, stream=True)
    assert next(stream) == pieces[0] and torch.is_grad_enabled()
    with pytest.raises(ValueError, match="stream of this model is still open"):
        made.generate("Sort: cab")
    stream.close()
    assert same(made.model, clean)
    assert made.generate("Sort: cab", max_new_tokens=24) == whole


@pytest.mark.parametrize("runtime", ["eager", "graph"])
def test_inference_mode_leaves_nothing_behind(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are made in it cannot be written outside of it."""
    monkeypatch.setattr("adafuse.adapted.refuse_use", lambda *_: None)
    made = adapted().use("switch")
    with torch.inference_mode():
        inside = made.generate(PROMPT, strategy="gather", runtime=runtime, max_new_tokens=TOKENS)
        piece = next(made.generate("Sort: cab", stream=True))
        theirs = made.model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)
    outside = made.generate(PROMPT, runtime=runtime, max_new_tokens=TOKENS)
    assert torch.equal(inside, outside) and torch.equal(theirs, outside)
    assert made.generate("Sort: cab").startswith(piece)


def test_draws_are_alike_for_a_seed() -> None:
    made = adapted()

    def drawn(**options: Any) -> str:
        return made.generate("Sort: cab", max_new_tokens=16, **options)

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=5.0, top_p=1e-6) == drawn(temperature=1e-4) == drawn()


def test_draws_follow_the_softmax_within_top_p() -> None:
    from adafuse.engine.answers import chooser

    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20_000, 1)
    share = torch.bincount(chooser(2.0, 1.0, 0, torch.device("cpu"))(logits).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(share, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)
    # 0.64 alone is not enough, 0.64 + 0.24 is
    assert set(chooser(1.0, 0.8, 0, torch.device("cpu"))(logits).flatten().tolist()) == {2, 3}


@pytest.mark.parametrize("method", ["adafuse", "mola", "pesc", "mixlora", "lora"])
def test_a_saved_adapter_is_loaded_in_three_lines(method: str, tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "model")
    made = adapted(method, folder, tokenizer=None)
    made.save(tmp_path / "adapter")
    loaded = adafuse.load(folder, tmp_path / "adapter")
    assert (
        loaded.generate("Sort: cab")
        == made.generate("Sort: cab")
        != adafuse.load(folder).generate("Sort: cab")
    )
    # the adapter's folder names its backbone
    assert adafuse.load(tmp_path / "adapter").generate("Sort: cab") == made.generate("Sort: cab")


def test_detaching_gives_the_backbone_back_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True).requires_grad_(True)
    model.save_pretrained(tmp_path / "before")
    before, generate = weights(model), model.generate
    with adapted(model=model) as made:
        made.generate(PROMPT, strategy="switch")
        made.use("simple_merge").model.generate(PROMPT, max_new_tokens=4)
        made.merge([0, 1])
        with made.disable_adapter() as plain:
            assert plain is model and same(model, before)
        assert not same(model, before)
    assert (
        same(model, before)
        and model.generate == generate
        and all(p.requires_grad for p in model.parameters())
    )
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / when / "model.safetensors").read_bytes() for when in ("before", "after")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="no adapter"):
        made.save(tmp_path / "adapter")


def test_who_keeps_the_model_alone_keeps_the_adapter_in_it() -> None:
    made = adapted().use("switch")
    want, model = greedy(made, PROMPT), made.model
    del made
    gc.collect()
    assert torch.equal(model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False), want)


def test_a_move_lays_the_experts_out_anew() -> None:
    made = adapted().to(torch.bfloat16)
    assert {p.dtype for p in made.adapter.parameters()} == {torch.bfloat16, torch.float32}
    text = made.generate("Sort: cab", strategy="dense")
    assert made.float().dtype is torch.float32
    assert len(text) > 0 and torch.equal(made.generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))


def test_gates_are_a_row_for_each_chosen_expert() -> None:
    made = adapted()
    frame = made.gates(["ab", "Sort: cab"])
    assert list(frame.columns) == ["text", "position", "token", "layer", "site", "expert", "weight"]
    assert len(frame) == (2 + 9) * 2 and set(frame.site) == {"token"} and frame.layer.isna().all()
    first = frame[(frame.text == 1) & (frame.position == 0)]
    ids = torch.tensor([made.tokenizer("Sort: cab").input_ids])
    with made.disable_adapter() as model:
        normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    want = made.adapter.token_router(normed[0, :1])
    assert first.expert.tolist() == want.index_TK[0].tolist()
    assert first.weight.tolist() == pytest.approx(want.weight_TK[0].tolist())
    layers = adapted("mola", targets=["q_proj", "v_proj"]).gates("ab")
    assert sorted(set(layers.layer)) == [0, 1, 2, 3] and set(layers.site) == {"q_proj", "v_proj"}
    bypassed = adapted(null_expert=True).gates("Sort: cab")
    assert bypassed[bypassed.expert < 0].weight.eq(0).all()


def test_merged_experts_are_an_ordinary_model() -> None:
    made = adapted()
    merged = made.merge(experts=[2, 0], weights=[0.75, 0.5])
    assert type(merged) is type(made.model) and "generate" not in vars(merged)
    path = "model.layers.1.mlp.down_proj"
    lora, base = made.adapter.sites[path].lora, made.adapter.sites[path].base.weight
    want = base + 2.0 * sum(w * lora.lora_B[e] @ lora.lora_A[e] for e, w in ((2, 0.75), (0, 0.5)))
    torch.testing.assert_close(merged.get_submodule(path).weight, want)
    plain = adapted("lora")
    said = plain.merge().generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)
    assert torch.equal(said, greedy(plain, PROMPT))


def test_weights_that_are_loaded_in_service_are_those_that_decode() -> None:
    made, other = adapted(), adafuse.attach(tiny_model(), seed=5, **SMALL)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))


def test_a_fit_says_what_rows_lose_and_goes_on_with_its_own_alone(tmp_path: Path) -> None:
    made = adapted()
    with pytest.warns(UserWarning, match="16 whose answer lost its end"):
        adafuse.fit(made, ITEMS, steps=1, max_length=4, folder=tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="holds a fit of other items"):
        adafuse.fit(made, ITEMS[:4], steps=1, max_length=4, folder=tmp_path)


@pytest.mark.parametrize("only", [None, "router"])
def test_a_fit_learns_and_leaves_alone_what_it_should(only: str | None, tmp_path: Path) -> None:
    made = adapted()
    before = {id(p): p.detach().clone() for p in made.adapter.parameters()}
    with made.disable_adapter() as model:
        clean = weights(model)
    losses = adafuse.fit(made, ITEMS, steps=12, learning_rate=3e-2, batch=4, only=only)
    assert only == "router" or losses.loss.iloc[-1] < losses.loss.iloc[0]
    routers = {id(router.weight) for router in made.adapter.routers().values()}
    moved = {
        key
        for key in before
        for p in made.adapter.parameters()
        if id(p) == key and not torch.equal(p, before[key])
    }
    assert moved == (routers if only else set(before))
    made.save(tmp_path / "adapter")
    assert torch.equal(made.generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))
    with made.disable_adapter() as model:
        assert same(model, clean)


@pytest.mark.parametrize("routing", ["token", "layerwise"])
def test_loras_of_other_people_become_experts_behind_a_router_that_is_trained(
    routing: str, tmp_path: Path
) -> None:
    folders = [loras.lora(tmp_path / "a", 1), loras.lora(tmp_path / "b", 2, r=3, lora_alpha=9)]
    made = adafuse.from_loras(tiny_model(), folders, routing=routing, tokenizer=byte_tokenizer())
    before = {id(p): p.detach().clone() for p in made.adapter.parameters()}
    adafuse.fit(made, ITEMS, steps=4, learning_rate=3e-2, batch=4)
    moved = {id(p) for p in made.adapter.parameters() if not torch.equal(p, before[id(p)])}
    assert moved == {id(router.weight) for router in made.adapter.routers().values()}
    assert torch.equal(made.generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))
    with torch.no_grad():
        ours = made.merge(experts=[1], weights=[1.0])(PROMPT).logits
    torch.testing.assert_close(ours, loras.logits(folders[1], PROMPT), atol=2e-5, rtol=0)
    made.save(tmp_path / "adapter")
    again = adafuse.load(tiny_model(), tmp_path / "adapter", tokenizer=byte_tokenizer())
    assert torch.equal(again.generate(PROMPT), made.generate(PROMPT))
    experts = [p.detach().clone() for lora in again.adapter.loras().values() for p in lora.parameters()]
    adafuse.fit(again, ITEMS, steps=2, learning_rate=3e-2, batch=4)
    still = [p for lora in again.adapter.loras().values() for p in lora.parameters()]
    assert all(map(torch.equal, experts, still)), "they are other people's after a load, too"


def test_an_adapter_of_another_backbone_is_refused_unless_asked(tmp_path: Path) -> None:
    made, other = adapted(), tiny_model(hidden_act="relu")
    made.save(tmp_path)
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(ValueError, match="made for another backbone"):
        adafuse.load(other, tmp_path)
    assert adafuse.load(other, tmp_path, any_base=True).adapter is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("strategy", "runtime"),
    [
        ("gather", "graph"),
        ("gather", "compiled"),
        ("switch", "graph"),
        ("gather", "lean"),
        ("rebase", "lean"),
    ],
)
def test_captured_steps_give_the_tokens_of_the_reference(strategy: str, runtime: str) -> None:
    made = adapted().to("cuda").use(strategy, runtime)
    prompt = PROMPT.cuda()
    for length in (12, 9):
        want = greedy(made, prompt[:, :length])
        assert torch.equal(made.generate(prompt[:, :length], max_new_tokens=TOKENS), want)
    clean = weights(made.model)
    assert len(list(made.generate("Sort: cab", stream=True))) > 1 and same(made.model, clean)


def test_a_loop_of_ones_own_trains_it() -> None:
    made = adafuse.attach(tiny_model(), **SMALL, dropout=0.0).train()
    optimiser = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(made(input_ids=PROMPT, labels=PROMPT).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert torch.equal(made.eval().generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))


def test_arms_are_measured_beside_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.BUFFER_MIB, "cpu", 4)
    monkeypatch.setattr("adafuse.bench.rounds.preempted", lambda where, seen: None)
    made = adapted(model=tiny_model(num_hidden_layers=2))
    sizes = {"context": 8, "rounds": 3, "block_tokens": 8, "check_tokens": 4}
    frame = adafuse.measure(made, ["gather", "switch", "gather/graph"], batch=2, **sizes)
    assert list(frame.index) == ["backbone", "gather", "switch", "backbone/graph", "gather/graph"]
    gather = frame.loc["gather"]
    assert (
        gather.low <= gather.ms_per_token <= gather.high
        and gather.ratio_low <= gather.ratio <= gather.ratio_high
    )
    assert frame.loc["backbone"].ratio == 1 and gather.check_greedy == 0 and gather.reason == ""
    assert "gates of this batch differ" in frame.loc["switch"].reason and frame.ms_per_token.isna()["switch"]
    assert "use runtime='eager'" in frame.loc["gather/graph"].reason
    assert torch.equal(made.generate(PROMPT, max_new_tokens=TOKENS), greedy(made, PROMPT))


def beneath() -> adafuse.Adapted:
    made = adapted()
    made.model.to(torch.bfloat16)
    return made


def spoilt(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


def forged(folder: Path) -> Path:
    """A saved adapter whose description was changed, and sealed anew."""
    adapted().save(folder)
    file = folder / "router_config.json"
    found = {key: value for key, value in json.loads(file.read_text()).items() if key != "seal"}
    found["experts"]["top_k"] = 9
    file.write_text(json.dumps(found | {"seal": content_hash(found)}))
    return folder


ERRORS: dict[str, Callable[[Path], object]] = {
    r"method 'adafused' is none of \['adafuse'": lambda _: adafuse.attach(tiny_model(), "adafused"),
    "targets has .*'c_attn'": lambda _: adafuse.attach(tiny_model(), targets=["c_attn"]),
    "seed='x' must be a whole number": lambda _: adafuse.attach(tiny_model(), seed="x"),
    "rank=0 must be a whole number": lambda _: adafuse.attach(tiny_model(), rank=0),
    "rank 17 exceed the width 16 of k_proj": lambda _: adafuse.attach(tiny_model(), rank=17),
    "top_k=5 exceeds experts=4": lambda _: adafuse.attach(tiny_model(), experts=4, top_k=5),
    "no option drop: a method has": lambda _: adafuse.attach(tiny_model(), drop=0.1),
    "lora has one expert": lambda _: adafuse.attach(tiny_model(), "lora", experts=4),
    "is not a folder": lambda where: adafuse.load(where / "nothing"),
    "no router_config.json": lambda where: adafuse.load(tiny_model(), where),
    "no model_type|describes": lambda where: adafuse.load(spoilt(save(tiny_model(), where / "model"))),
    "no causal LM": lambda _: adafuse.load(torch.nn.Linear(2, 2)),
    "adapter already": lambda _: adafuse.attach(adapted()),
    "has an adapter inside": lambda _: adafuse.attach(adapted().model, "mola"),
    "dtype='int8' is none of": lambda where: adafuse.load(save(tiny_model(), where / "model"), dtype="int8"),
    "strategy='merge' is none of .*'gather'": lambda _: adapted().use("merge"),
    "strategy='peft' is none of": lambda _: adapted().generate("a", strategy="peft"),
    r"routing='adafuse' is none of \['token'": lambda where: adafuse.from_loras(
        tiny_model(), [where], routing="adafuse"
    ),
    "must be a list of PEFT LoRA folders": lambda where: adafuse.from_loras(tiny_model(), where),
    "folders=.3. must be a list": lambda _: adafuse.from_loras(tiny_model(), [3]),
    "top_k=9 exceeds experts=4": lambda where: adafuse.load(tiny_model(), forged(where)),
    "adapter=3 is no folder": lambda _: adafuse.load(tiny_model(), 3),
    "has no adapter_config.json": lambda where: adafuse.from_loras(tiny_model(), [where]),
    "runtime='cuda' is none of .*'graph'": lambda _: adapted().use(runtime="cuda"),
    "runtime=graph captures a CUDA graph": lambda _: adapted().generate("a", runtime="graph"),
    "pesc cannot use strategy switch": lambda _: adapted("pesc").generate("a", strategy="switch"),
    "mola cannot use strategy rebase": lambda _: adapted("mola").use("rebase"),
    "2 prompts have one each": lambda _: adapted().generate(["a", "b"], strategy="switch"),
    "without a tokenizer": lambda _: adafuse.load(tiny_model()).generate("a"),
    "is no prompt": lambda _: adapted().generate(["a", 3]),
    "no prompt: give a text": lambda _: adapted().generate([]),
    "prompt 1 has no token": lambda _: adapted().generate(["a", ""]),
    "padding stands on the left": lambda _: adapted().generate(
        {"input_ids": [[5, 6]], "attention_mask": [[1, 0]]}
    ),
    "3 is no model": lambda _: adafuse.load(3),
    "targets=None is neither 'all-linear'": lambda _: adafuse.attach(tiny_model(), targets=None),
    "dropout=2.0 must be": lambda _: adafuse.attach(tiny_model(), dropout=2.0),
    "device='gpu' is none": lambda _: adafuse.attach(tiny_model(), device="gpu"),
    "needs prompts": lambda _: adapted().generate(),
    "has no input_ids": lambda _: adapted().generate({"ids": [[5]]}),
    "seed=None": lambda _: adapted().generate("a", temperature=1.0, seed=None),
    "is a file: name a folder": lambda where: adapted().save(save(tiny_model(), where) / "config.json"),
    "holds a model": lambda where: adapted().save(save(tiny_model(), where)),
    "tokenizer='a/folder' is no tokenizer": lambda _: adafuse.load(tiny_model(), tokenizer="a/folder"),
    "arms is empty": lambda _: adafuse.measure(adapted(), []),
    "max_new_tokens=0 must": lambda _: adapted().generate("a", max_new_tokens=0),
    "ids must lie from 0 to 259": lambda _: adapted().generate(PROMPT + 250),
    "moved or cast beneath": lambda _: beneath().generate("a"),
    "was moved or cast": lambda _: beneath().model.generate(PROMPT),
    "has an adapter inside, which no checkpoint": lambda where: adapted().save_pretrained(where),
    "256 positions": lambda _: adapted().generate("a", max_new_tokens=300),
    "temperature=-1": lambda _: adapted().generate("a", temperature=-1),
    "temperature=1e-45 must be": lambda _: adapted().generate("a", temperature=1e-45),
    "top_p=0": lambda _: adapted().generate("a", temperature=1, top_p=0),
    "stop=''": lambda _: adapted().generate("a", stop=""),
    "no option num_beams": lambda _: adapted().generate("a", num_beams=2),
    "strategy= goes with texts": lambda _: adapted().generate(input_ids=PROMPT, strategy="switch"),
    "stream=True gives the pieces of one text": lambda _: adapted().generate(["a", "b"], stream=True),
    "call eval\\(\\) first": lambda _: adapted().train().generate("a"),
    "lora has no gates": lambda _: adapted("lora").gates("a"),
    "lora has no router to train": lambda _: adafuse.fit(adapted("lora"), ITEMS, steps=1, only="router"),
    "only='experts'": lambda _: adafuse.fit(adapted(), ITEMS, steps=1, only="experts"),
    "items, line 2, label": lambda _: adafuse.fit(
        adapted(), [ITEMS[0], {"prompt": "a", "choices": ["b", "c"]}], steps=1
    ),
    "steps='3' must be a whole number": lambda _: adafuse.fit(adapted(), ITEMS, steps="3"),
    "learning_rate='x' must be a number": lambda _: adafuse.fit(adapted(), ITEMS, steps=1, learning_rate="x"),
    "LlamaForCausalLM is no adapted model": lambda _: adafuse.fit(tiny_model(), ITEMS, steps=1),
    "batch='x' must be a whole number": lambda _: adafuse.measure(adapted(), ["gather"], batch="x"),
    "rounds=1 must be .* at least 2": lambda _: adafuse.measure(adapted(), ["gather"], rounds=1),
    "top_p=0.5 is for drawing": lambda _: adapted().generate("a", top_p=0.5),
    "stop=3 must be": lambda _: adapted().generate("a", stop=3),
    r"experts=\[True\] must be": lambda _: adapted().merge([True]),
    "weights=1.0 must be a list": lambda _: adapted().merge([0], 1.0),
    "items is empty": lambda _: adafuse.fit(adapted(), [], steps=1),
    "no adapter in this model": lambda _: adafuse.load(tiny_model()).gates("a"),
    "experts=\\[4\\] must be different numbers from 0 to 3": lambda _: adapted().merge([4]),
    "say which": lambda _: adapted().merge(),
    "must be 2 finite numbers": lambda _: adapted().merge([0, 1], [1.0]),
    "mixlora are not linear in the weight": lambda _: adapted("mixlora").merge([0]),
    "arm 'gather/gpu': runtime='gpu'": lambda _: adafuse.measure(adapted(), ["gather/gpu"]),
    "exceeds 256 positions": lambda _: adafuse.measure(adapted(), ["gather"], context=250),
}


@pytest.mark.parametrize("said", ERRORS)
def test_a_mistake_is_one_line(said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        ERRORS[said](tmp_path)
    assert "\n" not in str(error.value)


def test_importing_the_package_costs_nothing() -> None:
    said = (
        "import sys, adafuse; print('torch' in sys.modules, callable(adafuse.load), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "True"]
