"""A folder that is not the whole of what its config.json describes is refused in one line, before torch is loaded."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adafuse.config import Model
from adafuse.model import backbone
from adafuse.model.declared import check_cell, positions
from adafuse.shape import read_json
from synthetic.checkpoints import change, declare, edit, overwrite_header, rename, save, shard, tiny_model
from synthetic.configurations import ROOT, compose

Damage = Callable[[Path], object]
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NORM = "model.layers.1.input_layernorm.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


def write(name: str, text: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def said(**fields: object) -> Damage:
    return lambda folder: declare(folder, **fields)


def scaled(**fields: object) -> Damage:
    return said(rope_parameters=None, rope_scaling=fields)


def cut(name: str, keep: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def without_shard(folder: Path) -> None:
    (folder / shard(folder)[1]).unlink()


def foreign_index(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=places | {"model.layers.0.extra": next(iter(places.values()))})


def twice(folder: Path) -> None:
    first, second = shard(folder)
    shutil.copy(folder / first, folder / second)


def two_files(folder: Path) -> None:
    """As GPT-2 had them."""
    (folder / TOKENIZER).unlink()
    (folder / "vocab.json").write_text(json.dumps(backbone.byte_tokenizer().get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def more_tokens(folder: Path) -> None:
    tokenizer = backbone.byte_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)


DAMAGES: dict[str, tuple[Damage, str]] = {
    # weights
    "a tensor is missing": (lambda f: rename(f, {NORM: None}), f"lacks {NORM}:"),
    "a tensor too many": (lambda f: rename(f, {NORM: f"x.{NORM}"}), f"lacks {NORM} and has x.{NORM}, which"),
    "every name has a prefix": (
        lambda f: rename(f, {"": "x."}),
        "and 36 more and has x.lm_head.weight, x.model.",
    ),
    "too few blocks": (said(num_hidden_layers=5), "num_hidden_layers=5, the weights have 4 blocks"),
    "too many blocks": (said(num_hidden_layers=2), "num_hidden_layers=2, the weights have 4 blocks"),
    "absurdly many blocks": (said(num_hidden_layers=10**9), "the weights have 4 blocks"),
    "a wrong shape": (
        lambda f: change(f, KEY, torch.ones(8, 32)),
        f"{KEY} as [8, 32], but config.json (num_key",
    ),
    "untied, and no output": (lambda f: rename(f, {"lm_head.weight": None}), "lacks lm_head.weight"),
    "an LFS pointer": (write(WEIGHTS, POINTER), f"{WEIGHTS} is a Git LFS pointer"),
    "truncated": (cut(WEIGHTS, 20_000), f"{WEIGHTS} is damaged or truncated: it has 20000 bytes"),
    "cut in its header": (cut(WEIGHTS, 100), f"{WEIGHTS} is damaged or truncated (its header"),
    "empty": (write(WEIGHTS, ""), f"{WEIGHTS} is damaged"),
    "no header": (write(WEIGHTS, b"\x05\0\0\0\0\0\0\0{[}]x"), f"{WEIGHTS} is damaged (its header"),
    "bytes for another shape": (lambda f: overwrite_header(f / WEIGHTS, shape=[7]), "which is not [7]"),
    "packed numbers": (
        lambda f: overwrite_header(f / WEIGHTS, dtype="F8_E4M3"),
        "as F8_E4M3: these are quantised",
    ),
    "a kind of number that is none": (lambda f: overwrite_header(f / WEIGHTS, dtype=["F32"]), "as ['F32']"),
    "a shape of halves": (
        lambda f: overwrite_header(f / WEIGHTS, shape=[8.0]),
        "(its header cannot be read)",
    ),
    "a tensor in two files": (twice, "which is what model-00001-of-00002.safetensors has"),
    "a shard is missing": (without_shard, "names model-00002-of-00002.safetensors, which is not there"),
    "an index of something else": (foreign_index, "model.layers.0.extra, which is in none of its files"),
    "an index without a map": (
        lambda f: (shard(f), edit(f / "model.safetensors.index.json", weight_map=...)),
        "has no weight_map",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no *.safetensors"),
    "weights of another name": (
        lambda f: (f / WEIGHTS).rename(f / "w.safetensors"),
        "has w.safetensors but neither",
    ),
    "an adapter": (write("adapter_config.json", "{}"), "holds adapter_config.json"),
    # config.json
    "no config.json": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config.json: no JSON": (write("config.json", "{"), "config.json is not valid JSON"),
    "config.json: no text": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config.json: no object": (write("config.json", "[1]"), "config.json is not a JSON object"),
    "config.json: nested deeply": (write("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "config.json: a pointer": (write("config.json", POINTER), "config.json is a Git LFS pointer"),
    "another architecture": (said(model_type="gemma2"), "not a causal LM of"),
    "a classifier": (said(architectures=["LlamaForSequenceClassification"]), "not a causal LM of"),
    "a mixture": (said(model_type="mixtral", architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    "no width": (said(hidden_size=...), "config.json: it has no hidden_size"),
    "no key heads, and they are fewer": (said(num_key_value_heads=...), "no num_key_value_heads, head_dim=8"),
    "no key heads, which others need": (
        said(model_type="mistral", num_key_value_heads=...),
        "no num_key_value_heads",
    ),
    "no positions": (said(max_position_embeddings=...), "config.json: it has no max_position_embeddings"),
    "another head_dim": (said(head_dim=16), "head_dim=16"),
    "an odd head_dim": (said(head_dim=7), "head_dim=7 is odd"),
    "heads that do not divide": (said(num_attention_heads=3), "no multiple of num_attention_heads=3"),
    "key heads that do not divide": (said(num_key_value_heads=3), "no multiple of num_key_value_heads=3"),
    "a width in quotes": (said(hidden_size="32"), "hidden_size='32' is not a whole number"),
    "no blocks": (said(num_hidden_layers=0), "num_hidden_layers=0 is not a whole number"),
    "an epsilon of nothing": (said(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    "another vocabulary": (said(vocab_size=300), "vocab_size=300"),
    "an activation nobody knows": (said(hidden_act="sine"), "hidden_act=sine"),
    "a padding token beyond": (said(pad_token_id=260), "pad_token_id=260 is no token"),
    "quantised": (
        said(quantization_config={"quant_method": "gptq", "bits": 4}),
        "it has a quantization_config",
    ),
    "quantised, and nobody says how": (said(quantization_config={}), "it has a quantization_config"),
    "names that are none": (said(architectures=5), "architectures=5 is not a list"),
    "a flag in quotes": (
        said(tie_word_embeddings="false"),
        "tie_word_embeddings='false' is not true or false",
    ),
    "a flag of nothing": (said(attention_bias=None), "attention_bias=None is not true or false"),
    "a share beyond 1": (said(attention_dropout=2.0), "attention_dropout=2.0 is not a number from 0 to 1"),
    "a share that is none": (said(initializer_range=float("nan")), "initializer_range=nan"),
    "a dtype nobody has": (said(dtype="int4"), "dtype='int4' is not one of"),
    "more positions than a number holds": (
        said(max_position_embeddings=10**30),
        "max_position_embeddings=1000",
    ),
    "a byte order mark": (
        lambda f: write("config.json", b"\xef\xbb\xbf" + (f / "config.json").read_bytes())(f),
        "config.json is not valid JSON",
    ),
    "config.json: of two bytes": (
        lambda f: write("config.json", (f / "config.json").read_text().encode("utf-16"))(f),
        "config.json is not valid JSON",
    ),
    "code of its own": (said(auto_map={"AutoModelForCausalLM": "m.Model"}), "code of its own (auto_map)"),
    "unknown rope": (scaled(rope_type="spiral"), "rope_type='spiral'"),
    "rope: old spelling": (scaled(type="su"), "rope_type='su'"),
    "rope without its factor": (scaled(rope_type="linear"), "rope_type=linear has no factor"),
    "rope of letters": (scaled(rope_type="linear", factor="4"), "factor='4', which is no number"),
    "rope of a list": (scaled(rope_type=["linear"], factor=2.0), "rope_type=['linear'], which is none of"),
    "rope that shrinks": (scaled(rope_type="linear", factor=0.5), "factor=0.5, which must be at least 1"),
    "rope of zeros": (
        scaled(rope_type="longrope", short_factor=[0.0] * 4, long_factor=[1.0] * 4),
        "short_factor=[0.0, 0.0, 0.0, 0.0], which must be above 0",
    ),
    "rope without its first length": (
        scaled(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
        "has no original_max_position_embeddings",
    ),
    "rope between two equal ends": (
        scaled(rope_type="yarn", factor=8.0, beta_slow=2, beta_fast=2),
        "beta_slow=2, which must be below beta_fast=2",
    ),
    "rope by kind of block": (
        said(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "for all blocks",
    ),
    "longrope of another width": (
        scaled(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]),
        "needs 4 numbers",
    ),
    "half a rotation": (said(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "windows that Llama lacks": (
        said(layer_types=["full_attention"] * 3 + ["sliding_attention"]),
        "which model_type=llama",
    ),
    "kinds that are lists": (said(layer_types=[[], [], [], []]), "layer_types must name"),
    "kinds for other blocks": (said(layer_types=["full_attention"] * 3), "for each of num_hidden_layers=4"),
    "a window of nothing": (said(sliding_window=0), "sliding_window=0"),
    # tokenizer
    "no tokenizer": (lambda f: (f / TOKENIZER).unlink(), "save the tokenizer"),
    "tokenizer: a pointer": (write(TOKENIZER, POINTER), "tokenizer.json is a Git LFS pointer"),
    "tokenizer: something else": (write(TOKENIZER, '{"a": 1}'), "tokenizer.json is no tokenizer"),
    "more tokens than rows": (more_tokens, "2 tokens beyond the 260 rows of the embedding"),
    "tokenizer: code of its own": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.Tokenizer", None]}),
        "tokenizer_config.json: it asks for code of its own",
    ),
    "an end that is a number": (
        lambda f: edit(f / "tokenizer_config.json", eos_token=2),
        "tokenizer_config.json: eos_token=2 is no token",
    ),
    "a padding that the tokenizer lacks": (
        lambda f: edit(f / "tokenizer_config.json", pad_token="<gap>"),
        "tokenizer_config.json has 1 tokens beyond the 260 rows",
    ),
    "tokenizer: cut by chance": (
        lambda f: edit(f / TOKENIZER, model=read_json(f / TOKENIZER)["model"] | {"dropout": 0.5}),
        "tokenizer.json: its model has dropout=0.5",
    ),
    "an end of generation that is text": (
        write("generation_config.json", '{"eos_token_id": "2"}'),
        "generation_config.json: eos_token_id=2 is no token",
    ),
    "settings of generation that are no JSON": (
        write("generation_config.json", "{"),
        "generation_config.json is not",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "checkpoint")


def check(folder: Path) -> None:
    backbone.check_source(Model(name="own", path=str(folder)))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(name: str, folder: Path) -> None:
    damage, message = DAMAGES[name]
    check(folder)
    damage(folder)
    with pytest.raises(ValueError) as error:
        check(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


SOUND: dict[str, Damage] = {
    "in shards": shard,
    "bf16": lambda f: [change(f, name, torch.ones(260, 32).bfloat16()) for name in ("lm_head.weight",)],
    "frequencies, as older ones have": lambda f: change(
        f, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)
    ),
    "consolidated weights beside them": write("consolidated.safetensors", "not read"),
    "rows to spare": lambda f: (
        declare(f, vocab_size=264),
        [change(f, name, torch.ones(264, 32)) for name in ("lm_head.weight", "model.embed_tokens.weight")],
    ),
    "an older rope_scaling": scaled(type="dynamic", factor=2.0),
    "a tokenizer in two files": two_files,
    "notes beside rope": scaled(type="yarn", factor=2.0, finetuned=True, truncate=False),
    "no architectures": said(architectures=...),
    "ways of being called": said(
        return_dict=False, output_hidden_states=True, output_attentions=True, attn_implementation="eager"
    ),
    "no special tokens": said(pad_token_id=None, eos_token_id=[2, 3]),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_transformers_reads_is_accepted(name: str, folder: Path) -> None:
    SOUND[name](folder)
    check(folder)
    model, _ = backbone.load(compose(f"model.path={folder}"))
    assert model(torch.tensor([[5, 6]])).keys() == {"logits", "past_key_values"}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("mistral", {"sliding_window": 16, "head_dim": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_every_family_holds_what_its_config_describes(
    model_type: str, changes: dict, tiny_llama, tmp_path: Path
) -> None:
    folder = save(tiny_llama(model_type, **changes), tmp_path / "checkpoint")
    check(folder)
    backbone.load(compose(f"model.path={folder}"))


@pytest.mark.parametrize(
    "name", ["a tensor is missing", "a tensor too many", "too few blocks", "a wrong shape"]
)
def test_loading_is_strict_by_itself(name: str, folder: Path) -> None:
    """As it must be for a backbone from the hub, whose files nobody has looked at."""
    DAMAGES[name][0](folder)
    with pytest.raises(
        ValueError, match="checkpoint is not what its config.json describes|cannot load"
    ) as error:
        backbone.load(compose(f"model.path={folder}"))
    assert "\n" not in str(error.value)


def test_an_output_of_its_own_where_config_json_says_none(folder: Path) -> None:
    declare(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight of its own: set tie_word_embeddings=false"):
        backbone.load(compose(f"model.path={folder}"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(value: float, folder: Path) -> None:
    change(folder, NORM, value)
    with pytest.raises(ValueError, match=f"{NORM}: 1 of .* numbers are NaN or infinite: copy .* again"):
        backbone.load(compose(f"model.path={folder}"))


def test_code_that_comes_with_a_tokenizer_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t.py").write_text("raise SystemExit('ran')")
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "t.Tokenizer"]},
        tokenizer_class="Own",
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="contains custom code"):
        backbone.from_folder(str(folder), None, compose().model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["context=300"], "context=300 exceeds its max_position_embeddings=256"),
        (["experts.rank=17"], "experts of rank 17 exceed the width 16 of k_proj"),
        (["experts.targets=[gate_proj]", "experts.rank=33"], "exceed the width 32 of gate_proj"),
    ],
)
def test_a_cell_that_does_not_fit_is_one_line(overrides: list[str], message: str, folder: Path) -> None:
    fits = compose("task=latency", f"model.path={folder}", "context=256", "experts.rank=16", "arms=smoke")
    check_cell(fits)
    with pytest.raises(ValueError, match=message):
        check_cell(compose("task=latency", f"model.path={folder}", "arms=smoke", *overrides))


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 256), ("longrope", 200)])
def test_frequencies_that_would_change_on_the_way_are_refused_by_name(
    kind: str, limit: int, folder: Path
) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 200}
    declare(
        folder, rope_parameters={"rope_type": kind, "factor": 2.0, **(factors if kind == "longrope" else {})}
    )
    check(folder)
    cell = ["task=latency", f"model.path={folder}", "arms=smoke"]
    check_cell(compose(*cell, f"context={limit - 68}"))
    with pytest.raises(
        ValueError, match=f"rope_type={kind} .* beyond {limit} positions.* context={limit - 68}"
    ):
        check_cell(compose(*cell, f"context={limit - 67}"))


def test_a_sequence_has_the_frequencies_of_a_short_one(folder: Path) -> None:
    assert positions(read_json(folder / "config.json")) == 256
    short = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 200}
    declare(folder, rope_parameters=None, rope_scaling={"type": "longrope", **short})
    model, _ = backbone.load(compose(f"model.path={folder}"))
    assert positions(read_json(folder / "config.json")) == positions(model.config.to_dict()) == 200


def test_a_sweep_refuses_its_backbone_once_and_without_torch(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)
    for experiment in ("own_model", "table2"):
        command = [
            sys.executable,
            "-X",
            "importtime",
            str(ROOT / "scripts/run.py"),
            f"experiment={experiment}",
        ]
        command += [f"model.path={folder}", f"runs_dir={tmp_path / 'runs'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == 2 and done.stdout == ""
        assert lines == [
            f"error: {folder / WEIGHTS} is a Git LFS pointer, not weights: run git lfs pull, or download it whole"
        ]
        assert "| torch\n" not in done.stderr
