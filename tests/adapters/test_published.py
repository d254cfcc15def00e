"""MixLoRA's and MoLA's files give what their papers say, computed here slowly and apart, or are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import adafuse
from adafuse import strategies
from adafuse.adapters import declared_lora, imports
from adafuse.adapters.published import is_published, load_published
from adafuse.config import StrategyName
from adafuse.engine.decode import forward_logits
from synthetic.checkpoints import tiny_model

IDS = torch.randint(4, 260, (2, 10), generator=torch.Generator().manual_seed(0))
MLP, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "v_proj")
MIXLORA = {
    **{"peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "bias": "none"},
    **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": [*ATTENTION, *MLP]},
    **{"routing_strategy": "mixlora", "num_experts": 3, "top_k": 2, "act_fn": "silu"},
}
MOLA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION], "bias": "none"}


def sizes() -> dict[str, tuple[int, int]]:
    return declared_lora.linears(tiny_model().config.to_dict())


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def mixlora(of_expert: int = 4, names: str = "new") -> dict[str, Tensor]:
    """The tensors of such an adapter with 3 experts, in the names of its last or of its first version."""
    torch.manual_seed(1)
    found = {}
    for path, (inner, outer) in sizes().items():
        _, _, block, _, name = path.split(".")
        prefix = f"mixlora.layers.{block}"
        if name in ATTENTION:
            found[f"{prefix}.self_attn.{name}.lora_A.weight"] = drawn(4, inner)
            found[f"{prefix}.self_attn.{name}.lora_B.weight"] = drawn(outer, 4)
        for e in range(3) if name in MLP else ():
            place = f"mlp.{name}.experts.{e}" if names == "new" else f"experts.{e}.{OLD[name]}"
            found[f"{prefix}.{place}.lora_A.weight"] = drawn(of_expert, inner)
            found[f"{prefix}.{place}.lora_B.weight"] = drawn(outer, of_expert)
        found[f"{prefix}.{'mlp.moe_gate' if names == 'new' else 'gate'}.weight"] = drawn(3, 32)
    return found


OLD = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}


def mola(counts: list[int], ranks: list[int], spelt: str = "lora_A.default_{e}") -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {}
    for path, (inner, outer) in sizes().items():
        block, name = int(path.split(".")[2]), path.rpartition(".")[2]
        if name in ATTENTION:
            prefix = f"base_model.model.{path}"
            found[f"{prefix}.lora_router.weight"] = drawn(counts[block], inner)
            for e in range(counts[block]):
                key = f"{prefix}.{spelt.format(e=e)}.weight"
                found[key] = drawn(ranks[block], inner)
                found[key.replace("lora_A", "lora_B")] = drawn(outer, ranks[block])
    return found


def write(folder: Path, declared: dict[str, Any], tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(declared))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Slow(nn.Module):
    """In a module's place: a function of its input, of the frozen module and of nothing of ours."""

    def __init__(self, base: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.slow = base, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.slow(self.base, x)


def gates(router: Tensor, x: Tensor, top_k: int) -> Tensor:
    """Weights of all experts."""
    weight, index = torch.softmax(x @ router.T, -1).topk(top_k)
    return torch.zeros(*x.shape[:-1], len(router)).scatter(-1, index, weight / weight.sum(-1, keepdim=True))


def theirs(replace: Callable[[str, nn.Module], Callable[[nn.Module, Tensor], Tensor] | None]) -> Tensor:
    model = tiny_model()
    for path, module in list(model.named_modules()):
        if (forward := replace(path, module)) is not None:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, Slow(module, forward))
    with torch.no_grad():
        return model(IDS).logits


def ours(folder: Path, **how: Any) -> Tensor:
    assert is_published(folder)
    model = tiny_model()
    with load_published(model, folder, **how).installing(strategies.make(StrategyName.dense)):
        return forward_logits(model, IDS)


def mixlora_slowly(found: dict[str, Tensor], scaling: float) -> Tensor:
    def lora(key: str, x: Tensor, by: float) -> Tensor:
        return x @ found[f"{key}.lora_A.weight"].T @ found[f"{key}.lora_B.weight"].T * by

    def replace(path: str, module: nn.Module) -> Any:
        words = path.split(".")
        prefix = ".".join(["mixlora", *words[1:]])
        if words[-1] in ATTENTION:
            return lambda base, x: base(x) + lora(prefix, x, 2.0)
        if words[-1] != "mlp":
            return None

        def mixed(base: Any, x: Tensor) -> Tensor:
            weight, out = gates(found[f"{prefix}.moe_gate.weight"], x, 2), 0.0
            for e in range(3):
                gate = base.gate_proj(x) + lora(f"{prefix}.gate_proj.experts.{e}", x, scaling)
                inner = F.silu(gate) * (base.up_proj(x) + lora(f"{prefix}.up_proj.experts.{e}", x, scaling))
                down = base.down_proj(inner) + lora(f"{prefix}.down_proj.experts.{e}", inner, scaling)
                out = out + weight[..., e, None] * down
            return out

        return mixed

    return theirs(replace)


@pytest.mark.parametrize("names", ["new", "old"])
def test_mixlora_is_read(names: str, tmp_path: Path) -> None:
    wanted = mixlora_slowly(mixlora(), 2.0)
    declared = MIXLORA | ({"routing_strategy": "mixtral"} if names == "old" else {})
    if names == "old":
        declared["target_modules"] = [*ATTENTION, *OLD.values()]
    got = ours(write(tmp_path / "a", declared, mixlora(names=names), pickled=names == "old"))
    assert (got - wanted).abs().max() < 2e-5 < (wanted - tiny_model()(IDS).logits).abs().max()


def test_mixlora_whose_experts_have_a_rank_of_their_own(tmp_path: Path) -> None:
    declared = MIXLORA | {
        "expert_lora": {"r": 2, "lora_alpha": 6},
        "target_modules": dict.fromkeys([*ATTENTION, *MLP], True),
    }
    got = ours(write(tmp_path / "a", declared, mixlora(of_expert=2)))
    assert (got - mixlora_slowly(mixlora(of_expert=2), 3.0)).abs().max() < 2e-5


def test_mixlora_with_lora_on_some_linears(tmp_path: Path) -> None:
    def without(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in found.items() if "self_attn" not in k and "up_proj" not in k}

    declared = MIXLORA | {"target_modules": ["gate_proj", "down_proj"]}
    zeros = {k: torch.zeros_like(v) if k not in without(mixlora()) else v for k, v in mixlora().items()}
    got = ours(write(tmp_path / "a", declared, without(mixlora())))
    assert (got - mixlora_slowly(zeros, 2.0)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("counts", "ranks", "spelt"),
    [
        ([3, 3, 3, 3], [4, 4, 4, 4], "lora_A.default_{e}"),
        ([2, 2, 3, 4], [4, 4, 4, 4], "lora_A_{e}"),
        ([3, 3, 3, 3], [4, 2, 2, 3], "lora_A_{e}"),
    ],
)
def test_mola_is_read(counts: list[int], ranks: list[int], spelt: str, tmp_path: Path) -> None:
    found = mola(counts, ranks, spelt)

    def replace(path: str, module: nn.Module) -> Any:
        key = f"base_model.model.{path}"
        if path.rpartition(".")[2] not in ATTENTION:
            return None
        block = int(path.split(".")[2])

        def mixed(base: nn.Module, x: Tensor) -> Tensor:
            weight, out = gates(found[f"{key}.lora_router.weight"], x, 2), base(x)
            for e in range(counts[block]):
                name = f"{key}.{spelt.format(e=e)}.weight"
                product = x @ found[name].T @ found[name.replace("lora_A", "lora_B")].T
                out = out + weight[..., e, None] * product * 8 / ranks[block]
            return out

        return mixed

    declared = MOLA | {"r": ranks if len(set(ranks)) > 1 else ranks[0]}
    got = ours(write(tmp_path / "a", declared, found, pickled=True), top_k=2)
    assert (got - theirs(replace)).abs().max() < 2e-5


def test_it_is_loaded_and_saved_as_ours(tmp_path: Path) -> None:
    loaded = adafuse.load(tiny_model(), write(tmp_path / "a", MIXLORA, mixlora()))
    loaded.save(tmp_path / "ours")
    again = adafuse.load(tiny_model(), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)


GATE = "mixlora.layers.0.mlp.moe_gate.weight"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top-p": ({"routing_strategy": "mixlora-dynamic"}, {}, "'mixlora-dynamic' is another routing"),
    "Switch": ({"routing_strategy": "mixlora-switch"}, {}, "'mixlora-switch' is another routing"),
    "an activation of its own": ({"act_fn": "gelu_new"}, {}, "act_fn='gelu_new' is not the backbone's silu"),
    "DoRA": ({"use_dora": True}, {}, "use_dora: DoRA"),
    "DoRA in its experts": ({"expert_lora": {"use_dora": True}}, {}, "use_dora: DoRA"),
    "noise": ({"jitter_noise": 0.1}, {}, "jitter_noise"),
    "experts in words": ({"expert_lora": "rank 4"}, {}, "of another kind than MixLoRA writes"),
    "targets in words": ({"target_modules": 7}, {}, "of another kind than MixLoRA writes"),
    "no count": ({"num_experts": None}, {}, "no numbers of experts"),
    "a field of tomorrow": (
        {"shared_expert": True},
        {},
        "shared_expert is a field that this code does not know",
    ),
    "another rank": ({"r": 8}, {}, "where its configuration and the backbone make it"),
    "experts that are not there": ({"num_experts": 4}, {}, "it lacks .*gate_proj.3.lora_A"),
    "experts too many": ({"num_experts": 2}, {}, r"it holds .*\.2\.lora_A"),
    "no router": ({}, {GATE: None}, "it lacks model.layers.0.mlp.weight"),
    "a router of another width": ({}, {GATE: torch.ones(3, 1)}, r"has torch.float32 \[3, 1\]"),
    "not a number": ({}, {GATE: torch.ones(3, 32) / 0}, "not finite"),
    "doubles": ({}, {GATE: torch.ones(3, 32).long()}, "int64|I64"),
    "something else": ({}, {"mixlora.layers.0.bias": torch.ones(1)}, "no part of MixLoRA's layout"),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_mixlora_is_not_is_refused_by_name(name: str, pickled: bool, tmp_path: Path) -> None:
    fields, tensors, message = REFUSED[name]
    found = {key: one for key, one in (mixlora() | tensors).items() if one is not None}
    folder = write(tmp_path / "a", MIXLORA | fields, found, pickled)
    with pytest.raises(ValueError, match=message) as refused:
        load_published(tiny_model(), folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_what_mola_is_not_is_refused_by_name(tmp_path: Path) -> None:
    found = mola([2, 2, 2, 2], [4, 4, 4, 4])
    folder = write(tmp_path / "a", MOLA, found)
    for top_k in (None, 3):
        with pytest.raises(ValueError, match="pass top_k="):
            load_published(tiny_model(), folder, top_k)
    write(folder, MOLA | {"r": 8}, found)
    with pytest.raises(ValueError, match=r"\[4, 32\], where its configuration .* \[8, 32\]"):
        load_published(tiny_model(), folder, 2)
    write(folder, MOLA, mola([2, 3, 2, 2], [4] * 4))
    load_published(tiny_model(), folder, 2)
    with pytest.raises(ValueError, match="one number in each quarter"):
        load_published(tiny_model(num_hidden_layers=8), folder, 2)


def test_as_an_expert_a_whole_adapter_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", MIXLORA, mixlora())
    with pytest.raises(ValueError, match="'MIXLORA' is a whole adapter, not an expert"):
        imports.inspect(folder, tiny_model().config.to_dict())
