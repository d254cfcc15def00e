"""What one arm holds: measured in a pass of its own, one line a record, one line too for what does not fit."""

from pathlib import Path

import pytest
import torch
import yaml

from adafuse import records
from adafuse.bench import memory, workload
from adafuse.engine import decoders
from synthetic import memory as made_memory
from synthetic.configurations import GEOMETRY, ROOT, compose

QUICK = ["task=memory", "latency.trained_adapters=false", "context=8"]
RUN = {
    "task": "memory",
    "cell_id": "c",
    "config_hash": "0",
    "config": {},
    "machine": {},
    "schema": records.SCHEMA,
}


def measure(model, tmp_path: Path, arm: str, *overrides: str, where: str = "cpu") -> records.Record:
    config = compose(*GEOMETRY, *QUICK, "arms=all", f"arms.run=[{arm}]", *overrides)
    path = tmp_path / f"{arm}.jsonl"
    with records.open_record(path, RUN) as record:
        memory.run(config, model, where, record)
    return records.read(path)


def line_of(model, tmp_path: Path, arm: str, *overrides: str, where: str = "cpu") -> dict:
    (line,) = measure(model, tmp_path, arm, *overrides, where=where).of("memory")
    return line


def test_one_line_says_what_a_cpu_can(tiny_llama, tmp_path: Path) -> None:
    record = measure(tiny_llama(), tmp_path, "adafuse_switch")
    (line,) = record.of("memory")
    assert record.status == "ok" and [one["kind"] for one in record.lines] == ["run", "memory", "end"]
    assert line["arm"] == "adafuse_switch"
    assert line["process_gib"] > line["weights_gib"] > 0
    assert line["peak_gib"] is line["peak_load_gib"] is line["reserved_gib"] is None
    assert "CUDA" in line["note"] and "resident" in line["note"]


def test_adapters_weigh_more_than_the_backbone(tiny_llama, tmp_path: Path) -> None:
    arms = ("base", "pesc_loop", "adafuse_loop", "adafuse_switch", "adafuse_rebase")
    weighs = {arm: line_of(tiny_llama(), tmp_path, arm)["weights_gib"] for arm in arms}
    assert weighs["base"] < min(weighs["pesc_loop"], weighs["adafuse_loop"])
    assert weighs["adafuse_loop"] == weighs["adafuse_switch"], "merging in place keeps no second backbone"
    linears = (
        sum(m.weight.nbytes for m in tiny_llama().model.modules() if isinstance(m, torch.nn.Linear)) / 2**30
    )
    assert weighs["adafuse_rebase"] - weighs["adafuse_switch"] == pytest.approx(linears), (
        "rebase reads clean ones"
    )


def test_the_arm_decodes_a_block_and_leaves_the_weights_alone(
    tiny_llama, tmp_path: Path, monkeypatch
) -> None:
    steps: list[int] = []
    run = decoders.Eager.run
    monkeypatch.setattr(decoders.Eager, "run", lambda self, count: (steps.append(count), run(self, count))[1])
    model = tiny_llama()
    clean = [p.detach().clone() for p in model.parameters()]
    line_of(model, tmp_path, "adafuse_switch", "latency.block_tokens=70")
    assert steps == [70]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean, strict=True))


def test_only_the_adapter_of_the_arm_is_built(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    built: list[str] = []
    adapter = workload.Adapter
    monkeypatch.setattr(
        workload,
        "Adapter",
        lambda model, method, *rest: (built.append(method.name), adapter(model, method, *rest))[1],
    )
    line_of(tiny_llama(), tmp_path, "mola_loop")
    line_of(tiny_llama(), tmp_path, "base")
    assert built == ["mola"]


def test_what_does_not_fit_is_one_line(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB.\nA paragraph follows")

    monkeypatch.setattr(memory, "make", full)
    record = measure(tiny_llama(), tmp_path, "mola_loop")
    assert record.status == "error" and record.of("memory") == []
    (error,) = record.of("error")
    assert error["where"] == "arm mola_loop"
    assert error["message"].startswith("MemoryError: mola_loop does not fit this machine")
    assert "paragraph" not in error["message"]


@pytest.mark.parametrize("arms", [["arms=smoke"], ["arms=paper", "arms.run=[base,mola_loop]"]])
def test_more_than_one_arm_is_refused_in_one_line(arms: list[str]) -> None:
    with pytest.raises(ValueError, match="task=memory measures one arm a process") as refused:
        compose("task=memory", *arms)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("listed", "gib", "said"),
    [
        ({"me": 3.0, 17: 9.0}, 3.0, "for this process"),
        ({17: 9.0}, 9.0, "only process"),
        ({17: 9.0, 18: 1.0}, None, "several processes"),
        ({}, 6.0, "all that is in use"),
    ],
)
def test_what_the_driver_tells_of_this_process(
    monkeypatch, listed: dict, gib: float | None, said: str
) -> None:
    own = {memory.os.getpid() if pid == "me" else pid: held for pid, held in listed.items()}
    monkeypatch.setattr(memory, "_listed_gib", lambda: own)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (74 * 2**30, 80 * 2**30))
    found, why = memory._of_process()
    assert found == gib and said in why


@pytest.mark.gpu
def test_peaks_on_a_gpu(tiny_llama, tmp_path: Path) -> None:
    arms = ("base", "adafuse_loop", "adafuse_switch", "adafuse_rebase", "base_graph")
    wide = {"hidden_size": 128, "intermediate_size": 384}
    # one process for all of them here: the peak is reset for each, and only allocations count
    lines = {arm: line_of(tiny_llama(**wide).cuda(), tmp_path, arm, where="cuda") for arm in arms}
    for line in lines.values():
        assert line["peak_load_gib"] >= line["peak_gib"] >= line["weights_gib"] > 0
        assert line["reserved_gib"] >= line["peak_gib"]
        assert line["process_gib"] is None or line["process_gib"] > line["weights_gib"]
    copy_gib = lines["adafuse_rebase"]["weights_gib"] - lines["adafuse_switch"]["weights_gib"]
    peaks = {arm: line["peak_gib"] for arm, line in lines.items()}
    assert peaks["adafuse_rebase"] - peaks["adafuse_switch"] >= 0.9 * copy_gib > 0
    assert peaks["adafuse_switch"] - peaks["adafuse_loop"] < copy_gib / 2, (
        "copies to come back to are on the host"
    )


def test_sweeps_name_every_arm_of_the_table() -> None:
    text = (ROOT / "conf/experiment/table5.yaml").read_text()
    swept = yaml.safe_load(text)["hydra"]["sweeper"]["params"]["arms.run"]
    assert swept.replace("[", "").replace("]", "").split(",") == list(made_memory.PEAKS)
