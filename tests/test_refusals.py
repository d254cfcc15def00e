"""What a runtime or a strategy cannot carry is refused with the reason and the cure, before anything is loaded."""

import subprocess
import sys

import pytest

from adafuse.refusals import refuse_device
from synthetic.configurations import compose

ARM = "arms.table.adafuse_gather"
PEFT, PEFT_MERGE = "arms.table.lora_peft", "arms.table.adafuse_peft_merge"
REFUSED = [
    (
        ["arms.run=[adafuse_loop]", "arms.table.adafuse_loop.runtime=graph"],
        "waits for the host.*use masked_loop",
    ),
    (
        ["arms.run=[mola_loop]", "arms.table.mola_loop.runtime=compiled"],
        "waits for the host.*use masked_loop",
    ),
    (
        ["arms.run=[adafuse_switch]", "arms.table.adafuse_switch.runtime=compiled"],
        "rewrites weights.*use runtime=graph",
    ),
    (
        ["arms.run=[adafuse_switch_graph]", "batch=2"],
        "compares the gates of a batch on the host.*needs batch=1",
    ),
    (
        ["arms.run=[adafuse_gather]", f"{ARM}.strategy=fused", f"{ARM}.method=mola"],
        "must know the experts.*use gather",
    ),
    (
        ["arms.run=[adafuse_gather]", f"{ARM}.strategy=fused", f"{ARM}.method=pesc"],
        "must know the experts.*use gather",
    ),
    (["arms.run=[adafuse_fused_graph]", "batch=3"], "batch=3 exceeds the 2 rows.*use gather"),
    (["evaluate_strategy=fused", "suite.batch=16"], "suite.batch=16 exceeds the 2 rows.*use gather"),
    (
        ["arms.run=[lora_peft]", f"{PEFT}.method=adafuse"],
        "PEFT has no router; use method lora, or peft_merge",
    ),
    (["arms.run=[lora_peft]", f"{PEFT}.method=mola"], "PEFT has no router; use method lora, or peft_merge"),
    (["arms.run=[lora_peft]", f"{PEFT}.runtime=graph"], "PEFT's own Python.*use runtime=eager"),
    (["arms.run=[adafuse_peft_merge]", f"{PEFT_MERGE}.method=moral"], "that they share; use method adafuse"),
    (["arms.run=[adafuse_peft_merge]", f"{PEFT_MERGE}.method=pesc"], "that they share; use method adafuse"),
    (
        ["arms.run=[adafuse_peft_merge]", f"{PEFT_MERGE}.method=mixlora"],
        "that they share; use method adafuse",
    ),
    (
        ["arms.run=[adafuse_peft_merge]", f"{PEFT_MERGE}.runtime=compiled"],
        "PEFT's own Python.*use runtime=eager",
    ),
    (["arms.run=[adafuse_peft_merge]", "batch=2"], "one selection for the whole batch: use batch=1"),
    (["arms.run=[adafuse_dense]", "arms.table.adafuse_dense.runtime=lean"], "use gather, switch, rebase, or"),
    (["arms.run=[base_lean]", "arms.table.base_lean.strategy=fused"], "use dense, or runtime=graph"),
    (["arms.run=[base_lean]", "batch=65"], "up to 64 rows in runtime=lean, not batch=65"),
    (
        ["arms.run=[adafuse_switch_lean]", "method=adafuse", "method.router_input=previous_token"],
        "has no router_input=previous_token in runtime=lean: use runtime=graph",
    ),
    (["arms.run=[adafuse_switch_lean]", "batch=2"], "runtime=lean needs batch=1"),
    (["method=lora", "evaluate_strategy=peft"], "is no way to evaluate: use dense"),
    (["method=adafuse", "evaluate_strategy=peft_merge"], "is no way to evaluate: use dense"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    task = ["task=latency"] if overrides[0].startswith("arms") else []
    with pytest.raises(ValueError, match=message):
        compose(*task, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["arms.run=[adafuse_switch_graph]"],
        ["arms.run=[lora_rebase]", "arms.table.lora_rebase.runtime=graph", "batch=8"],
        ["arms.run=[base_gemv_compiled]", "batch=2"],
        ["arms.run=[adafuse_gather_lean,base_lean]", "batch=64"],
        ["arms=peft"],
        ["arms.run=[lora_peft]", "batch=8"],
        ["evaluate_strategy=fused", "suite.batch=2"],
    ],
    ids=str,
)
def test_what_can_work_is_not(overrides: list[str]) -> None:
    """Plain LoRA is merged before the step that is captured; the plain backbone has nothing to wait for."""
    compose(*overrides)


def test_captured_arms_need_a_gpu() -> None:
    config = compose("task=latency", "arms=graph")
    refuse_device(config, "cuda")
    with pytest.raises(ValueError, match="no CUDA device: use arms=paper or arms=controls"):
        refuse_device(config, "cpu")
    refuse_device(compose("task=latency", "arms=paper"), "cpu")


def test_the_limits_of_the_kernels_are_known_without_torch_and_triton() -> None:
    """Configuration is checked before anything heavy is imported, against the kernels' own numbers."""
    script = (
        "import sys; from adafuse.kernels.config import FUSED_MAX_BATCH, switch_stages; import adafuse.refusals; "
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
