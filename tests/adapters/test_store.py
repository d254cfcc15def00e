"""What is saved comes back bit for bit, PEFT opens an expert unaided, and foreign or damaged files are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from adafuse import strategies
from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.config import Config, StrategyName
from adafuse.engine.decode import forward_logits
from synthetic.adapters import only_expert
from synthetic.checkpoints import edit
from synthetic.configurations import GEOMETRY, compose

IDS = torch.randint(4, 260, (2, 10), generator=torch.Generator().manual_seed(0))


def make(model, config: Config, seed: int) -> Adapter:
    adapter = Adapter(model, config.method, config.experts, seed)
    randomise(adapter, seed, scale=0.3)
    return adapter


def logits(model, adapter: Adapter) -> torch.Tensor:
    adapter.install(strategies.make(StrategyName.dense))
    out = forward_logits(model, IDS)
    adapter.remove()
    return out


def test_a_saved_adapter_gives_the_same_logits(variant: Config, tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama()
    saved = make(model, variant, seed=0)
    store.save(saved, tmp_path, "tiny")
    loaded = store.load(make(model, variant, seed=9), tmp_path)
    assert torch.equal(logits(model, saved), logits(model, loaded))


@pytest.mark.parametrize(
    "method", ["mola", "mixlora", "adafuse", "adafuse method.router_input=previous_and_embedding"]
)
def test_plain_peft_opens_an_expert(method: str, tiny_llama, tmp_path: Path) -> None:
    """One expert alone, opened by PEFT, is the model with that expert's gate at one."""
    from peft import PeftModel

    model, config = tiny_llama(), compose(*GEOMETRY, *f"method={method}".split())
    adapter = make(model, config, seed=0)
    store.save(adapter, tmp_path, "tiny")
    only_expert(adapter, 1)
    ours = logits(model, adapter)
    opened = PeftModel.from_pretrained(model, str(tmp_path / "expert_01"), is_trainable=False)
    if method == "mixlora":
        opened.load_adapter(str(tmp_path / "static"), adapter_name="static")
        opened.base_model.set_adapter(["default", "static"])
    with torch.no_grad():
        theirs = opened(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_changed_file_is_refused(tiny_llama, tmp_path: Path) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    store.save(make(model, config, 0), tmp_path, "tiny")
    file = tmp_path / "expert_02" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="was changed after saving"):
        store.load(make(model, config, 0), tmp_path)


def test_another_geometry_is_refused(tiny_llama, tmp_path: Path) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    store.save(make(model, config, 0), tmp_path, "tiny")
    other = compose(
        "method=adafuse", "experts.rank=2", "experts.count=4", "experts.top_k=2", "experts.alpha=8"
    )
    with pytest.raises(ValueError, match="another experts"):
        store.load(make(model, other, 0), tmp_path)


def saved(folder: Path, tiny_llama, *overrides: str) -> Callable[..., Adapter]:
    """A saved adapter of AdaFuse, and how to load it, on its own backbone or on another one."""
    config = compose(*GEOMETRY, *(overrides or ["method=adafuse"]))
    store.save(make(tiny_llama(), config, 0), folder, "some/base")
    return lambda model=None, **how: store.load(make(model or tiny_llama(), config, 9), folder, **how)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["pesc", "mixlora", "adafuse"])
def test_the_same_adapter_is_the_same_bytes(method: str, tiny_llama, tmp_path: Path) -> None:
    for name in ("one", "two"):
        saved(tmp_path / name, tiny_llama, f"method={method}")
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    declared = [json.loads(data) for name, data in one.items() if name.endswith("adapter_config.json")]
    assert declared and all(found["target_modules"] == sorted(found["target_modules"]) for found in declared)


def test_the_card_says_what_a_reader_needs(tiny_llama, tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama)
    store.write_card(tmp_path, {"accuracy of reversing": 0.75})
    text = (tmp_path / "README.md").read_text()
    for words in (
        "base_model: some/base",
        "adafuse on some/base",
        "4 experts of rank 4, 2 of them for a token",
        "| accuracy of reversing | 0.75 |",
        'adafuse.load("some/base", adapter=',
        'subfolder="expert_00"',
        "add `license:`",
    ):
        assert words in text
    found = ModelCard.load(tmp_path / "README.md").data
    assert (found.base_model, found.license, "lora" in found.tags) == ("some/base", None, True)
    # its author may change it
    (tmp_path / "README.md").write_text("mine")
    assert store.describe(tmp_path)["base_model"] == "some/base"


def test_readers_are_told_no_path_of_this_machine(tiny_llama, tmp_path: Path) -> None:
    store.save(make(tiny_llama(), compose(*GEOMETRY, "method=adafuse"), 0), tmp_path, "/home/me/models/mine")
    told = {name: data for name, data in files_of(tmp_path).items() if b"/home" in data}
    # our own loader finds the backbone again by it
    assert set(told) == {"router_config.json"}


@pytest.mark.parametrize("method", ["pesc", "mixlora", "adafuse"])
def test_another_backbone_is_refused(method: str, tiny_llama, tmp_path: Path) -> None:
    load = saved(tmp_path, tiny_llama, f"method={method}")
    other = tiny_llama()
    other.model.layers[2].mlp.up_proj.weight[3, 4] += 0.5
    with pytest.raises(ValueError, match=r"made for another backbone \(some/base.*any_base=True"):
        load(other)
    load(other, any_base=True)
    load()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_backbone_is_the_same_one(dtype: str, tiny_llama, tmp_path: Path) -> None:
    load = saved(tmp_path / "float32", tiny_llama)
    cast = tiny_llama().to(getattr(torch, dtype))
    load(cast)
    config = compose(*GEOMETRY, "method=adafuse")
    store.save(make(cast, config, 0), tmp_path / dtype, "tiny")
    store.load(make(tiny_llama(), config, 0), tmp_path / dtype)


def test_what_is_saved_while_it_is_installed_belongs_to_the_same_backbone(tiny_llama, tmp_path: Path) -> None:
    for method in ("adafuse", "pesc"):
        model, config = tiny_llama(), compose(*GEOMETRY, f"method={method}")
        adapter = make(model, config, 0)
        with adapter.installing():
            store.save(adapter, tmp_path / method, "tiny")
        store.load(make(tiny_llama(), config, 9), tmp_path / method)
    with (
        adapter.installing(strategies.make(StrategyName.dense)),
        pytest.raises(ValueError, match="remove it, then"),
    ):
        store.save(adapter, tmp_path / "merged", "tiny")


def test_a_folder_of_the_first_format_loads_with_one_warning(tiny_llama, tmp_path: Path) -> None:
    load = saved(tmp_path, tiny_llama)
    file = tmp_path / "router_config.json"
    found = json.loads(file.read_text())
    table = {name: digest for name, digest in found["sha256"].items() if "adapter_config" not in name}
    edit(file, format_version=1, base=..., seal=..., sha256=table)
    with pytest.warns(UserWarning, match="has no fingerprint") as said:
        load()
    assert len(said) == 1
    for wrong in ({}, dict(list(table.items())[1:])):
        edit(file, sha256=wrong)
        with pytest.raises(ValueError, match="no checksum of each of its files"):
            load()


def test_a_folder_that_is_older_than_a_setting_loads(tiny_llama, tmp_path: Path) -> None:
    config = compose(*GEOMETRY, "method=adafuse")
    store.save(make(tiny_llama(), config, seed=1), tmp_path, "base")
    said = json.loads((tmp_path / "router_config.json").read_text())
    method = {key: value for key, value in said["method"].items() if key != "blocks_per_decision"}
    reseal(tmp_path, method=method, experts_frozen=...)
    fresh = Adapter(tiny_llama(), config.method, config.experts, seed=9)
    assert len(store.load(fresh, tmp_path).trained()) == len(fresh.parameters())
    reseal(tmp_path, method=method | {"dropout": 0.5})
    with pytest.raises(ValueError, match="saved with another method"):
        store.load(fresh, tmp_path)


def reseal(folder: Path, **changes: object) -> None:
    """router_config.json changed by somebody who knows how it is sealed, checksums of the files included."""
    file = folder / "router_config.json"
    edit(file, **changes)
    found = {key: value for key, value in json.loads(file.read_text()).items() if key != "seal"}
    if "sha256" not in changes:
        found["sha256"] = {name: store.file_hash(folder / name) for name in found["sha256"]}
    file.write_text(json.dumps(found | {"seal": store.content_hash(found)}))


def with_router(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "router.safetensors"
    save_file({name.replace("_", "."): one for name, one in tensors.items()}, file)
    reseal(folder)


def elsewhere(folder: Path, link: str) -> None:
    """The same file, through a link that leads out of the folder."""
    target = shutil.move(folder / link, folder.parent / "outside")
    (folder / link).symlink_to(target)


def to_itself(link: Path) -> None:
    shutil.rmtree(link)
    link.symlink_to(link.name)


ROUTER = torch.zeros(4, 32)
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty description": (
        lambda f: (f / "router_config.json").write_text(""),
        "router_config.json is not valid",
    ),
    "a list": (lambda f: (f / "router_config.json").write_text("[]"), "is not a JSON object"),
    "a field that is missing": (lambda f: reseal(f, method=...), "has no method"),
    "a description by hand": (lambda f: edit(f / "router_config.json", base_model="x"), "was changed after"),
    "another format": (lambda f: reseal(f, format_version=3), "has format 3"),
    "no checksums": (lambda f: reseal(f, sha256={}), "no checksum of each"),
    "a configuration by hand": (
        lambda f: edit(f / "expert_01/adapter_config.json", r=2),
        "was changed after",
    ),
    "a folder outside": (lambda f: reseal(f, folders=["../../x", "b", "c", "d"]), "names other folders"),
    "an absolute folder": (lambda f: reseal(f, folders=["/tmp", "b", "c", "d"]), "names other folders"),
    "a link to a file": (lambda f: elsewhere(f, "router.safetensors"), "leads out of"),
    "a link to a folder": (lambda f: elsewhere(f, "expert_02"), "leads out of"),
    "a link to itself": (lambda f: to_itself(f / "expert_02"), "is a link to itself|leads out of|is missing"),
    "a router of one number": (lambda f: with_router(f, token_weight=torch.ones(1, 1)), r"as F32 \[1, 1\]"),
    "a router of integers": (lambda f: with_router(f, token_weight=ROUTER.long()), "as I64"),
    "a router in half": (lambda f: with_router(f, token_weight=ROUTER.half()), "as F16"),
    "a key too much": (
        lambda f: with_router(f, token_weight=ROUTER, x_y=torch.ones(1)),
        "lacks x.y, or has it",
    ),
    "a key too few": (lambda f: with_router(f, x_y=torch.ones(1)), "lacks token.weight, x.y"),
    "a router without numbers": (lambda f: with_router(f, token_weight=ROUTER / 0), "are not finite"),
    "a fingerprint of nothing": (lambda f: reseal(f, base={"sha256": {}}), "for another backbone"),
    "a truncated file": (
        lambda f: (f / "router.safetensors").write_bytes(b"123") and reseal(f),
        "is damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_hostile_folder_is_refused_in_one_line(name: str, tiny_llama, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    load = saved(folder, tiny_llama)
    change, message = DAMAGED[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        load()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("blobs", ["models--me--mine/blobs", "blobs/ab"])
def test_what_the_hub_has_cached_is_loaded_through_its_links(blobs: str, tiny_llama, tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--me--mine" / "snapshots" / "abc", tmp_path / blobs
    load = saved(folder, tiny_llama)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    load()


def test_every_expert_holds_its_own_numbers(tiny_llama, tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    first = [load_file(tmp_path / f"expert_0{e}" / "adapter_model.safetensors")[key] for e in range(4)]
    assert not any(torch.equal(first[0], other) for other in first[1:])


def test_nothing_is_written_through_a_link_or_among_another_adapters_experts(
    tiny_llama, tmp_path: Path
) -> None:
    saved(tmp_path / "four", tiny_llama)
    two = compose("method=adafuse", "experts.rank=4", "experts.count=2", "experts.top_k=2", "experts.alpha=8")
    with pytest.raises(ValueError, match="expert_02, expert_03 of another adapter"):
        store.save(make(tiny_llama(), two, 0), tmp_path / "four", "tiny")
    (tmp_path / "linked").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "linked" / "expert_00").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link"):
        store.save(make(tiny_llama(), two, 0), tmp_path / "linked", "tiny")
    assert not list((tmp_path / "outside").iterdir())
