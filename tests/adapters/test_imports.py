"""LoRA folders of anybody's give the logits that PEFT gives with them, or are refused by name in one line."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adafuse import strategies
from adafuse.adapters import declared_lora, imports
from adafuse.adapters.adapter import Adapter
from adafuse.config import Experts, StrategyName
from adafuse.engine.decode import forward_logits
from synthetic import loras
from synthetic.adapters import only_expert
from synthetic.checkpoints import tiny_model
from synthetic.configurations import GEOMETRY, ROOT, compose

IDS = torch.randint(4, 260, (2, 10), generator=torch.Generator().manual_seed(0))
FULL_PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"]
# what PEFT is asked for, in two folders that differ in rank and scaling beside
UNDERSTOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[23]\..*v_proj": 6, "v_proj": 3}
    },
    "alpha_pattern": {"alpha_pattern": {"q_proj": 5, "model.layers.2.self_attn.v_proj": 1.5}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "a regex": {"target_modules": r".*layers\.[013]\..*(q_proj|up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, some excluded": {
        "target_modules": "all-linear",
        "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"],
    },
    "excluded by a regex": {"exclude_modules": r".*layers\.2\..*"},
    "some layers": {"layers_to_transform": [1, 3]},
    "one layer, by a pattern": {"layers_to_transform": 2, "layers_pattern": "layers"},
    "full paths": {"target_modules": FULL_PATHS},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.1},
    "a rank that is no power of two": {"r": 5, "lora_alpha": 7},
}


def adapter_of(folders: list[Path], *overrides: str, missing_as_zeros: bool = False) -> Adapter:
    """AdaFuse with these folders as experts, in their own geometry."""
    model = tiny_model()
    found = [imports.inspect(folder, model.config.to_dict()) for folder in folders]
    imports.refuse_lacking(found, missing_as_zeros)
    config = compose(*GEOMETRY, *(overrides or ["method=adafuse"]))
    adapter = Adapter(model, config.method, imports.geometry(found, top_k=2), seed=0)
    imports.load_experts(adapter, folders, missing_as_zeros)
    return adapter


def ours(adapter: Adapter, expert: int) -> torch.Tensor:
    kept = {path: (one.lora_A.clone(), one.lora_B.clone()) for path, one in adapter.loras().items()}
    only_expert(adapter, expert)
    with adapter.installing(strategies.make(StrategyName.dense)):
        found = forward_logits(adapter.model, IDS)
    for path, (lora_A, lora_B) in kept.items():
        adapter.loras()[path].lora_A.data, adapter.loras()[path].lora_B.data = lora_A, lora_B
    return found


def check(folders: list[Path], **how: Any) -> None:
    adapter = adapter_of(folders, **how)
    for expert, folder in enumerate(folders):
        theirs = loras.logits(folder, IDS)
        assert (theirs - ours(adapter, expert)).abs().max() < 2e-5 < theirs.abs().max()


def two(folder: Path, **changes: Any) -> list[Path]:
    """The second has another rank and another alpha, so that one must be filled up and folded in."""
    changes = loras.QV | changes
    other = changes | {"r": changes["r"] - 1, "lora_alpha": 3}
    return [loras.lora(folder / "a", 1, **changes), loras.lora(folder / "b", 2, **other)]


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_experts_give_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    check(two(tmp_path, **UNDERSTOOD[name]))


@pytest.mark.parametrize("method", ["adafuse", "mola", "adafuse_layerwise"])
def test_in_every_method_whose_experts_are_lora(method: str, tmp_path: Path) -> None:
    folders = two(tmp_path)
    adapter = adapter_of(folders, f"method={method}")
    assert (loras.logits(folders[1], IDS) - ours(adapter, 1)).abs().max() < 2e-5


def test_all_linear_is_every_linear_but_the_head(tmp_path: Path) -> None:
    """PEFT writes the names that it found; who writes the word means them."""
    folders = two(tmp_path, target_modules="all-linear")
    loras.declare(folders[0], target_modules="all-linear")
    check(folders)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled within": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "DDP": lambda name: f"module.{name}",
    "bare": lambda name: name.removeprefix("base_model.model."),
    "the adapter's name": lambda name: name.replace("lora_A", "lora_A.default").replace(
        "lora_B", "lora_B.default"
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_names_that_wrappers_leave_are_understood(name: str, tmp_path: Path) -> None:
    folders = two(tmp_path)
    before = ours(adapter_of(folders), 0)
    loras.spell(folders[0], SPELLINGS[name])
    assert torch.equal(before, ours(adapter_of(folders), 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_factors_in_half_precision(dtype: str, tmp_path: Path) -> None:
    folders = two(tmp_path)
    loras.rewrite(folders[0], lambda found: {k: v.to(getattr(torch, dtype)) for k, v in found.items()})
    check(folders)


def test_a_pickle_of_tensors_is_read(tmp_path: Path) -> None:
    folders = two(tmp_path)
    loras.pickle(folders[0])
    check(folders)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folders = two(tmp_path)
    loras.pickle(folders[0], hostile=Hostile())
    with pytest.raises(ValueError, match="holds more than tensors.*is not opened"):
        imports.inspect(folders[0], tiny_model().config.to_dict())
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_tensors_that_hold_no_numbers_is_refused(tmp_path: Path) -> None:
    odd = {"sparse": torch.eye(4).to_sparse(), "nowhere": torch.ones(2, device="meta"), "words": ["a"]}
    for name, one in odd.items():
        folder = loras.lora(tmp_path / name)
        loras.pickle(folder, odd=one)
        with pytest.raises(ValueError, match="not opened|no LoRA factor|not a dictionary"):
            adapter_of([folder, folder])


def test_what_is_lacking_is_zero_only_if_asked(tmp_path: Path) -> None:
    folders = [loras.lora(tmp_path / "a", 1), loras.lora(tmp_path / "b", 2, target_modules=["q_proj"])]
    lacking = r"b does not adapt (model.layers.\d.self_attn.v_proj, ){2}.* and 1 more.*missing_as_zeros"
    with pytest.raises(ValueError, match=lacking):
        adapter_of(folders)
    check(folders, missing_as_zeros=True)


def test_a_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    for name in ("alice", "bob"):
        loras.lora(tmp_path / name)
    with pytest.raises(ValueError, match="it holds the adapters alice, bob, name one of them"):
        imports.inspect(tmp_path, tiny_model().config.to_dict())


def test_a_method_without_experts_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="q_proj.*where the method has no experts"):
        adapter_of([loras.lora(tmp_path, target_modules=["q_proj", "up_proj"])] * 4, "method=moral")
    with pytest.raises(ValueError, match="where the method has no experts"):
        adapter_of([loras.lora(tmp_path)] * 4, "method=adafuse", "method.first_expert_block=1")
    with pytest.raises(ValueError, match="a method whose experts are LoRA"):
        adapter_of([loras.lora(tmp_path)] * 4, "method=pesc")
    with pytest.raises(ValueError, match="2 LoRA folders for .4. experts"):
        model, config = tiny_model(), compose(*GEOMETRY, "method=adafuse")
        imports.load_experts(Adapter(model, config.method, config.experts, 0), [tmp_path] * 2)


def test_a_rank_beyond_the_geometry_is_refused(tmp_path: Path) -> None:
    model, config = tiny_model(), compose(*GEOMETRY, "method=adafuse")
    geometry = dataclasses.replace(config.experts, targets=["q_proj", "v_proj"], rank=3)
    with pytest.raises(ValueError, match="has rank 4 at .*: set experts.rank=4"):
        imports.load_experts(Adapter(model, config.method, geometry, 0), [loras.lora(tmp_path)] * 4)


def change(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: loras.declare(folder, **fields)


def tensors(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: loras.rewrite(folder, edit)


def first(
    found: dict[str, torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    name = next(iter(found))
    return found | {name: make(found[name])}


def with_number(value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    def put(one: torch.Tensor) -> torch.Tensor:
        one = one.to(dtype)
        one[1, 1] = value
        return one

    return tensors(lambda found: first(found, put))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
# the change to a good folder, and what the refusal names
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (change(use_dora=True), "use_dora: DoRA"),
    **{
        f"init {name}": (change(init_lora_weights=name), f"init_lora_weights='{name}' changes the backbone")
        for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something_new")
    },
    "LoftQ": (change(loftq_config={"loftq_bits": 4}), "loftq_config: LoftQ"),
    "CorDA": (change(corda_config={"corda_method": "ipm"}), "corda_config: CorDA"),
    "aLoRA": (change(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens: aLoRA"),
    "bias": (change(bias="lora_only"), "bias='lora_only'"),
    "lora_bias": (change(lora_bias=True), "lora_bias: B has a bias"),
    "modules_to_save": (change(modules_to_save=["lm_head"]), "modules_to_save: whole modules"),
    "fan_in_fan_out": (change(fan_in_fan_out=True), "fan_in_fan_out: "),
    "target_parameters": (change(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters: "),
    "layer_replication": (change(layer_replication=[[0, 2], [1, 3]]), "layer_replication: "),
    "QALoRA": (change(use_qalora=True), "use_qalora: QALoRA"),
    "trainable tokens": (change(trainable_token_indices=[5]), "trainable_token_indices: "),
    "Megatron": (change(megatron_config={"a": 1}), "megatron_config: "),
    "BD-LoRA": (change(use_bdlora={"nblocks": 2}), "use_bdlora: "),
    "Arrow": (change(arrow_config={"top_k": 3}), "arrow_config: "),
    "KaSA": (change(kasa_config={"a": 1}), "kasa_config: KaSA"),
    "IA3": (change(peft_type="IA3"), "peft_type='IA3' is not LORA"),
    "no type": (change(peft_type=...), "peft_type=None is not LORA"),
    "a field of tomorrow": (
        change(use_future=True),
        "use_future is a field that this code does not know",
    ),
    "a rank of none": (change(r=0), "r=0 is no rank"),
    "a rank of millions": (change(r=2**40), "is no rank"),
    "a rank of words": (change(r="8"), "r='8' is no rank"),
    "an alpha that is no number": (change(lora_alpha=float("nan")), "lora_alpha=nan is no alpha"),
    "no targets": (change(target_modules=None), "target_modules is empty"),
    "targets of numbers": (change(target_modules=[1]), "target_modules is neither"),
    "targets elsewhere": (change(target_modules=["c_attn"]), "none of the backbone's linears"),
    "no pattern": (change(target_modules="(q_proj"), "is no pattern"),
    "a pattern without end": (change(target_modules="(.|..|...)*[A-Z]"), "takes for ever"),
    "the head": (change(target_modules=["q_proj", "v_proj", "lm_head"]), "adapts lm_head"),
    "embeddings": (change(target_modules=["q_proj", "v_proj", "embed_tokens"]), "adapts model.embed_tokens"),
    "a pattern with layers": (
        change(target_modules=".*q_proj", layers_to_transform=[1]),
        "not with a pattern",
    ),
    "another rank than its tensors": (change(r=8), r"as \[4, 32\], where rank 8 .* make it \[8, 32\]"),
    "another backbone": (tensors(lambda t: first(t, lambda a: torch.zeros(4, 31))), r"as \[4, 31\]"),
    "more than it means": (change(target_modules=["q_proj"]), "v_proj.*which target_modules does not mean"),
    "less than it means": (
        change(target_modules=["q_proj", "v_proj", "o_proj"]),
        "lacks .*o_proj.lora_A.* and 5 more",
    ),
    "half of a pair": (
        tensors(lambda t: {k: v for k, v in t.items() if k != KEY}),
        "lacks .*0.self_attn.q_proj.lora_A",
    ),
    "a block that is not there": (
        lambda f: loras.spell(f, lambda name: name.replace("layers.3", "layers.7")),
        "layers.7.self_attn.q_proj.*the backbone does not have",
    ),
    "a foreign prefix": (
        lambda f: loras.spell(
            f, lambda name: name.replace("base_model.model.model.", "base_model.model.language.")
        ),
        "language.layers.0.*the backbone does not have",
    ),
    "a name twice": (
        tensors(lambda t: t | {KEY.replace("weight", "default.weight"): t[KEY].clone()}),
        "q_proj.lora_A twice",
    ),
    "an embedding": (
        tensors(lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.ones(2)}),
        "embed_tokens.weight, which is no LoRA",
    ),
    "factors of an embedding": (
        tensors(lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}),
        "lora_embedding_A, which is no LoRA",
    ),
    "a magnitude": (
        tensors(lambda t: t | {KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}),
        "lora_magnitude_vector, which",
    ),
    "not a number": (with_number(float("nan"), torch.float32), "not finite"),
    "infinity in bf16": (with_number(float("-inf"), torch.bfloat16), "not finite"),
    "not a number in fp16": (with_number(float("nan"), torch.float16), "not finite"),
    "integers": (tensors(lambda t: first(t, lambda a: a.to(torch.int32))), "as I32"),
    "doubles": (tensors(lambda t: first(t, lambda a: a.double())), "as F64"),
    "a truncated file": (
        lambda f: (f / loras.WEIGHTS).write_bytes((f / loras.WEIGHTS).read_bytes()[:-9]),
        "truncated",
    ),
    "no weights": (lambda f: (f / loras.WEIGHTS).unlink(), "has neither"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "an empty configuration": (lambda f: (f / "adapter_config.json").write_text(""), "not valid JSON"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loras.lora(tmp_path_factory.mktemp("loras") / "good")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_expert_is_refused_by_name(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declared_lora, "SECONDS", 0.3)
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in ("adapter_config.json", loras.WEIGHTS):
        (folder / file).write_bytes((good / file).read_bytes())
    shape = tiny_model().config.to_dict()
    imports.inspect(folder, shape)
    spoil, message = REFUSED[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as refused:
        imports.inspect(folder, shape)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_every_field_of_peft_has_its_place() -> None:
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= {*declared_lora.UNDERSTOOD, *declared_lora.IRRELEVANT, *declared_lora.REFUSED}


def test_numbers_in_a_pickle_are_looked_at_too(good: Path, tmp_path: Path) -> None:
    for name in ("twice", "strange", "unreal"):
        folder = loras.lora(tmp_path / name)
        beside = {"x": torch.ones(1)} if name == "strange" else {}
        if name == "twice":
            beside = {KEY.replace("weight", "default.weight"): torch.ones(4, 32)}
        if name == "unreal":
            with_number(float("nan"), torch.float32)(folder)
        loras.pickle(folder, **beside)
        shape = tiny_model().config.to_dict()
        with pytest.raises(ValueError, match="twice|no LoRA factor|not finite"):
            imports.inspect(folder, shape)


def test_nothing_heavy_is_imported_to_refuse() -> None:
    code = "import sys, adafuse.adapters.imports; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_geometry_is_that_of_the_folders(tmp_path: Path) -> None:
    shape = tiny_model().config.to_dict()
    same = [loras.lora(tmp_path / str(e), e, r=4 + e, lora_alpha=8 + 2 * e) for e in range(2)]
    found = imports.geometry([imports.inspect(folder, shape) for folder in same], top_k=2)
    wanted = Experts(
        ["q_proj", "v_proj"], rank=5, count=2, top_k=2, alpha=10.0, folders=[str(one) for one in same]
    )
    assert found == wanted
