"""What is saved comes back bit for bit, PEFT opens an expert unaided, and foreign or damaged files are refused."""

from pathlib import Path

import pytest
import torch

from adafuse import strategies
from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.experts import LoraExperts, MlpLoraExperts
from adafuse.config import Config, StrategyName
from adafuse.engine.decode import forward_logits
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


@pytest.mark.parametrize("method", ["mola", "mixlora", "adafuse"])
def test_plain_peft_opens_an_expert(method: str, tiny_llama, tmp_path: Path) -> None:
    """One expert alone, opened by PEFT, is the model with that expert's gate at one."""
    from peft import PeftModel

    model, config = tiny_llama(), compose(*GEOMETRY, f"method={method}")
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


def only_expert(adapter: Adapter, chosen: int) -> None:
    """Make every expert a copy of one: whatever the gates, their sum is one, so the mixture is that expert."""
    for site in adapter.sites.values():
        experts = getattr(site, "experts", None)
        parts = (
            [experts.gate_proj, experts.up_proj, experts.down_proj]
            if isinstance(experts, MlpLoraExperts)
            else [experts]
        )
        for lora in parts:
            if isinstance(lora, LoraExperts):
                lora.lora_A.data.copy_(lora.lora_A.data[chosen].expand_as(lora.lora_A).clone())
                lora.lora_B.data.copy_(lora.lora_B.data[chosen].expand_as(lora.lora_B).clone())


def test_third_party_lora_folders_become_experts(tiny_llama, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folders = []
    for e in range(4):
        theirs = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_llama(), theirs).save_pretrained(str(tmp_path / f"theirs{e}"))
        folders.append(tmp_path / f"theirs{e}")
    config = compose(*GEOMETRY, "method=adafuse", "experts.targets=[q_proj,v_proj]")
    model = tiny_llama()
    adapter = Adapter(model, config.method, config.experts, seed=0)
    before = logits(model, adapter)
    store.load_experts(adapter, folders)
    assert (logits(model, adapter) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8, "lora_alpha": 16}, "rank 8"),
        ({"lora_alpha": 4}, "set experts.alpha"),
        ({"target_modules": ["q_proj"]}, "adapt different modules"),
        ({"use_dora": True}, "plain LoRA"),
    ],
)
def test_a_third_party_folder_that_does_not_fit_is_refused(
    change, message, tiny_llama, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | change
    get_peft_model(tiny_llama(), LoraConfig(**theirs)).save_pretrained(str(tmp_path))
    config = compose(*GEOMETRY, "method=adafuse", "experts.targets=[q_proj,v_proj]")
    adapter = Adapter(tiny_llama(), config.method, config.experts, seed=0)
    with pytest.raises(ValueError, match=message):
        store.load_experts(adapter, [tmp_path] * 4)


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
