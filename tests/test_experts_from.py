"""experts.from=[folders]: other people's LoRA become the experts, the router alone is trained, evaluated and timed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adafuse import archive, cell, stages
from adafuse.bench.workload import adapter_of
from synthetic import loras
from synthetic.checkpoints import change, save, tiny_model
from synthetic.configurations import ROOT, compose
from synthetic.scripts import ALWAYS_COUNTED, call

QUICK = [
    *(
        "train.steps=2",
        "train.batch=4",
        "train.warmup_steps=1",
        "train.save_every_steps=1",
        "train.learning_rate=0.1",
    ),
    *("data.families=[copy,majority]", "data.train_items=8", "data.validation_items=4", "data.test_items=4"),
    *("latency.rounds=2", "latency.check_tokens=4", "context=8", "device=cpu", "suite.batch=8"),
]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """In a place that needs quotes; of two ranks and scalings."""
    folder = tmp_path_factory.mktemp("loras")
    return [loras.lora(folder / "one, of mine", 1), loras.lora(folder / "two", 2, r=3, lora_alpha=5)]


def configured(base: Path, folders: list[Path], *overrides: str) -> object:
    named = ",".join(f"'{folder}'" for folder in folders)
    return compose(
        f"model.path={base}", "model.dtype=float32", f"experts.folders=[{named}]", *QUICK, *overrides
    )


@pytest.mark.slow
def test_own_model_trains_evaluates_and_times_a_router_over_them(
    base: Path, brought: list[Path], tmp_path: Path
) -> None:
    named = ",".join(f"'{folder}'" for folder in brought)
    job = [
        "experiment=own_model",
        f"model.path={base}",
        f"experts.from=[{named}]",
        f"runs_dir={tmp_path}",
        *QUICK,
    ]
    job += ["method=lora,adafuse", "arms.run=[base,base_again,adafuse_gather]"]
    command = [sys.executable, "-c", ALWAYS_COUNTED, *job, "~hydra.callbacks.summary"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = archive.load([tmp_path / "records"]).records
    assert all(record.status == "ok" for record in found)
    (timed,) = [record for record in found if record.run["task"] == "latency"]
    assert all(line["passed"] for line in timed.of("check")) and timed.of("block")
    trained = {r.run["config"]["method"]["name"]: r for r in found if r.run["task"] == "train"}
    assert {name: r.of("parameters")[0]["trainable"] for name, r in trained.items()} == {
        # a router alone; plain LoRA has factors of its own
        "adafuse": 2 * 32,
        "lora": 4 * 8 * ((32 + 32) + (32 + 16)),
    }
    (folder,) = tmp_path.glob("adapters/*-adafuse-*")
    for e, own in enumerate(brought):
        ours, theirs = (
            load_file(path / "adapter_model.safetensors")[KEY] for path in (folder / f"expert_0{e}", own)
        )
        assert (ours[: theirs.shape[0]] == theirs).all() and not ours[theirs.shape[0] :].any()
    assert str(brought[0].parent) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_a_cell_is_known_by_what_the_folders_hold(base: Path, brought: list[Path], tmp_path: Path) -> None:
    def known(folders: list[Path], *overrides: str) -> str:
        return cell.cell_hash(configured(base, folders, "task=train", *overrides))

    elsewhere = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in brought]
    assert known(elsewhere) == known(brought) != known(brought[::-1])
    loras.declare(elsewhere[0], base_model_name_or_path="elsewhere", target_modules=["v_proj", "q_proj"])
    assert known(elsewhere) == known(brought), "PEFT writes names in any order"
    loras.rewrite(elsewhere[0], lambda found: found | {KEY: found[KEY] + 1})
    assert known(elsewhere) != known(brought)
    # what has no router is trained as ever, and knows nothing of them but their geometry
    assert known(elsewhere, "method=lora") == known(brought, "method=lora")


def test_an_adapter_that_was_put_in_the_place_of_another_is_refused(
    base: Path, brought: list[Path], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    config = configured(base, brought, "task=evaluate", f"runs_dir={runs}")
    assert stages.run(config, "test") == "done"
    folder = cell.adapter_dir(config, config.method)
    # one of the same method on another backbone
    other = Path(shutil.copytree(base, tmp_path / "other" / base.name))
    change(other, "model.norm.weight", 2.0)
    foreign = configured(other, brought, "task=train", f"runs_dir={tmp_path / 'foreign'}")
    assert stages.run(foreign, "test") == "done"
    shutil.rmtree(folder)
    shutil.copytree(cell.adapter_dir(foreign, foreign.method), folder)
    again = configured(base, brought, "task=evaluate", "evaluate_strategy=gather", f"runs_dir={runs}")
    with pytest.raises(ValueError, match="is not what .* describes: delete both"):
        stages.run(again, "test")
    from adafuse.evaluation import stage

    with pytest.raises(ValueError, match="was made for another backbone"):
        stage._fitted(again)


# what is asked for beside one good folder, and what is said before torch is loaded
REFUSED = {
    "no folder": (["experts.from=[/nowhere]"], "/nowhere is not a folder"),
    "none": (["experts.from=[]"], "experts.from=[] names no LoRA folder"),
    "no LoRA": (["experts.from=[{base},{two}]"], "has no adapter_config.json"),
    "one for two": (["experts.from={two}"], "experts.top_k=2 exceeds experts.count=1"),
    "a rank of one's own": (
        ["experts.from=[{two},{two}]", "experts.rank=8"],
        "experts.rank=8, but the folders",
    ),
    "experts that are no LoRA": (
        ["experts.from=[{two},{two}]", "method=pesc"],
        "method pesc has experts that are no LoRA",
    ),
    "a place without experts": (
        ["experts.from=[{two},{two}]", "method=moral"],
        "q_proj, where method moral has no",
    ),
    "equal budgets": (["experts.from=[{two},{two}]", "budget=equal"], "use budget=published"),
    "counts by depth": (
        ["experts.from=[{two},{two}]", "method=mola", "method.experts_by_quarter=[2,2,2,2]"],
        "method.experts_by_quarter is for experts that are trained here",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_in_one_line(
    name: str, base: Path, brought: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, message = REFUSED[name]
    two = shutil.copytree(brought[1], tmp_path / "two")
    job = [override.format(base=base, two=two) for override in overrides]
    done = call(capfd, "task=train", f"model.path={base}", f"runs_dir={tmp_path / 'runs'}", *job)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs" / "records").exists()


def test_nothing_heavy_is_loaded_to_refuse(base: Path, brought: list[Path], tmp_path: Path) -> None:
    bad = shutil.copytree(brought[1], tmp_path / "bad")
    loras.declare(bad, use_dora=True)
    job = ["task=train", f"model.path={base}", f"experts.from=[{bad},{brought[1]}]", f"runs_dir={tmp_path}"]
    code = (
        "import sys, runpy; sys.argv[0] = 'scripts/run.py'\n"
        "try: runpy.run_path('scripts/run.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *job], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "use_dora: DoRA" in done.stderr and "Traceback" not in done.stderr


def test_what_is_timed_without_training_has_their_experts_too(base: Path, brought: list[Path]) -> None:
    """Arms of a latency cell, or a drift, with a router as it was drawn."""
    config = configured(base, brought, "task=latency", "arms.run=[base,adafuse_gather]")
    adapter = adapter_of(config, tiny_model(), config.method)
    own = load_file(brought[0] / "adapter_model.safetensors")[KEY]
    assert (adapter.loras()["model.layers.0.self_attn.q_proj"].lora_A[0] == own).all()
    assert cell.cell_hash(config) != cell.cell_hash(
        configured(base, brought[::-1], "task=latency", "arms.run=[base,adafuse_gather]")
    )
    with pytest.raises(ValueError, match="method pesc has experts that are no LoRA"):
        configured(base, brought, "task=latency", "arms=paper")
