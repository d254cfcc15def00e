"""The table that a command ends with: from records alone, every number beside its interval, nothing left out unsaid."""

from adafuse.report.summary import summary

WHERE = {"experiment": "own_model"}
OWN = {"name": "own", "path": "/models/mine", "dtype": "float32", "shape": {}}


def evaluated(made, key: str, method: str, values: dict[str, float], seed: int = 0, **more):
    lines = [{"kind": "checkpoint", "path": "/models/mine", "stored_in": "bfloat16"}]
    for task, value in values.items():
        of = {"suite_task": task, "metric": "acc"}
        lines.append({"kind": "metric", **of, "value": value, "stderr": 0.1, "n": 20})
        lines.append(
            {"kind": "items", **of, "correct": [1.0] * round(20 * value) + [0.0] * round(20 - 20 * value)}
        )
    lines.append({"kind": "parameters", "trainable": 5000})
    own = {"method": {"name": method, "routing": "token"}, "model": OWN, **more}
    command = f"python scripts/run.py task=evaluate method={method} seed={seed}"
    return made(key, "evaluate", lines, header={**WHERE, "seed": seed, "command": command}, **own)


def timed(made, blocks: dict[str, list[float]], **more):
    lines = []
    for number in range(3):
        for position, (arm, ms) in enumerate(blocks.items()):
            place = {"arm": arm, "round": number, "position": position, "tokens": 64, "state": {}}
            excluded = "preempted: away" if ms[number] < 0 else None
            lines.append({"kind": "block", **place, "block_ms": 64 * abs(ms[number]), "excluded": excluded})
    memory = {"weights_gib": 0.5, "peak_gib": None, "note": ""}
    lines += [{"kind": "memory", "arm": arm, **memory} for arm in blocks]
    stood = {"routers": ["a", "b"], "changed_share": [0.25, 0.75], "lasts_tokens": [4.0, 2.0]}
    lines += [{"kind": "selections", "method": "adafuse", **stood}, *more.get("lines", [])]
    command = "python scripts/run.py task=latency method=base"
    header = {**WHERE, "command": command}
    return made(
        "f" * 12, "latency", lines, header=header, arms=["base", "base_again", "adafuse_switch"], model=OWN
    )


def test_accuracy_time_memory_and_changes_stand_in_it(made) -> None:
    records = [
        evaluated(made, "a" * 12, "base", {"copy": 0.5, "sort": 0.0}),
        evaluated(made, "b" * 12, "adafuse", {"copy": 1.0, "sort": 0.5}),
        timed(
            made, {"base": [2.0, 2.0, 4.0], "base_again": [2.0, 2.0, 4.0], "adafuse_switch": [3.0, 3.0, 6.0]}
        ),
    ]
    said = summary(records, "own_model")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[0] == "backbone /models/mine: stored in bfloat16, computed in float32"
    assert "accuracy, % [95 %], one seed, interval over items" in lines
    # Wilson's intervals of 10, 20 and 0 of 20
    assert "copy 20 50 [30, 70] 100 [84, 100]" in lines
    assert "sort 20 0 [0, 16] 50 [30, 70]" in lines
    assert "mean 40 25 [15, 38] 75 [62, 85]" in lines
    assert "trained parameters 5.00 k 5.00 k" in lines
    (head,) = (line for line in lines if line.startswith("latency: "))
    assert "mine, float32" in head
    assert "Backbone 2.00 [2.00, 4.00] 512 3" in lines
    assert "AdaFuse (switch) 3.00 [3.00, 6.00] 1.50 [1.50, 1.50] 512 3" in lines
    assert (
        "adafuse: experts change at 50% of tokens, a choice stands for 3.0 tokens (mean over 2 routers)"
        in lines
    )
    assert "left out:" not in said


def test_over_seeds_the_interval_is_that_of_seeds(made) -> None:
    values = {0: 0.4, 1: 0.5, 2: 0.6}
    records = [
        evaluated(made, f"{seed}" * 12, "base", {"copy": value}, seed) for seed, value in values.items()
    ]
    said = summary(records, "own_model")
    assert "accuracy, % [95 %], 3 seeds" in said and "50 [25, 75]" in said and "mean" not in said


def test_what_is_missing_is_named_with_its_reason(made) -> None:
    error = {
        "kind": "error",
        "where": "arm adafuse_switch",
        "message": "RuntimeError: no memory",
        "traceback": "",
    }
    latency = timed(made, {"base": [2.0, -2.0, 2.0], "base_again": [-2.0, -2.0, -2.0]}, lines=[error])
    broken = made(
        "c" * 12,
        "evaluate",
        [{"kind": "error", "where": "evaluate", "message": "ValueError: NaN", "traceback": ""}],
        "error",
        header=WHERE,
        model=OWN,
    )
    lines = [line.strip() for line in summary([latency, broken], "own_model").splitlines()]
    left = lines[lines.index("left out:") + 1 :]
    assert "base_again has no time: every block excluded: preempted: away" in left
    assert "adafuse_switch has no time: error: RuntimeError: no memory" in left
    assert "adafuse has no accuracy: error: ValueError: NaN" in left
    assert "blocks set aside, eager: 4 preempted" in left
