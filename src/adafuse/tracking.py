"""The mirror in Weights & Biases: one finished record becomes one run, after everything was timed.

In: the path of a finished record and the tracker's name. Out: nothing here; the record stays the only source
of the report. With WANDB_MODE=offline no account is needed. Next: report/__init__.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from adafuse.records import Record, read

if TYPE_CHECKING:
    import wandb

PROJECT = "adafuse"
BLOCK_COLUMNS = ["arm", "round", "position", "tokens", "block_ms", "excluded"]


def track(record_path: Path, tracker: str) -> None:
    """Mirror a finished record. Raises ValueError with one line for an unknown tracker or a refused login."""
    if tracker == "off":
        return
    if tracker != "wandb":
        raise ValueError(f"unknown tracker '{tracker}': choose tracker=off or tracker=wandb")
    record = read(record_path)
    if record.status == "unfinished":
        raise ValueError(f"record {record_path} is unfinished: only finished records are tracked")
    _to_wandb(record)


def _to_wandb(record: Record) -> None:
    try:
        import wandb
    except ImportError:
        raise ValueError("tracker=wandb needs wandb: pip install wandb, or use tracker=off") from None
    folder = Path(os.environ.get("WANDB_DIR") or record.run["config"].get("runs_dir", "."))
    folder.mkdir(parents=True, exist_ok=True)
    # A trainer that reports by itself leaves its run open; ours must not be mixed into it.
    options: dict[str, Any] = {"dir": str(folder), "reinit": "finish_previous"}
    try:
        with wandb.init(**run_settings(record), **options, settings=wandb.Settings(silent=True)) as run:
            _log(run, record)
    except wandb.errors.Error as exc:
        reason = " ".join(str(exc).split())
        raise ValueError(f"tracker=wandb: {reason}; set WANDB_MODE=offline or use tracker=off") from exc
    finally:
        # Everything is on disk, and no service of the tracker runs beside the next timed cell.
        wandb.teardown()


def _log(run: wandb.Run, record: Record) -> None:
    import wandb

    run.summary.update(summary(record))
    blocks = [
        [block[name] for name in BLOCK_COLUMNS[:-1]] + [str(block["excluded"])]
        for block in record.of("block")
    ]
    if blocks:
        run.log({"blocks": wandb.Table(columns=BLOCK_COLUMNS, data=blocks)})
    for line in record.of("loss"):
        run.log({key: line[key] for key in ("loss", "balance_loss", "learning_rate")}, step=line["step"])
    run.log_artifact(str(record.path), name=record.path.stem, type="record", aliases=[_commit(record)])


def run_settings(record: Record) -> dict[str, Any]:
    """What names the run: group = experiment, job = task, name = cell, and an id that a second upload meets
    again.
    """
    run = record.run
    arms = run["config"].get("arms", {}).get("run", []) if run["task"] == "latency" else []
    tags = [run["config"].get("model", {}).get("name"), run["machine"].get("name"), *arms]
    return {
        "project": PROJECT,
        "group": run.get("experiment") or run["task"],
        "job_type": run["task"],
        "name": run["cell_id"],
        "id": f"{run['config_hash']}-{run.get('replicate')}-{_commit(record)}",
        # wandb refuses tags of more than 64 characters
        "tags": [str(tag)[:64] for tag in tags if tag],
        "config": run["config"],
    }


def summary(record: Record) -> dict[str, Any]:
    """One number per name: accuracies, checks failed, and the median ms per token of each arm."""
    found: dict[str, Any] = {"status": record.status, "errors": len(record.of("error"))}
    found |= {f"{m['suite_task']}/{m['metric']}": m["value"] for m in record.of("metric")}
    found["failed_checks"] = sum(not check["passed"] for check in record.of("check"))
    times_ms: dict[str, list[float]] = {}
    for block in _counted(record):
        times_ms.setdefault(block["arm"], []).append(block["block_ms"] / block["tokens"])
    return found | {f"ms_per_token/{arm}": median(times) for arm, times in sorted(times_ms.items())}


def _counted(record: Record) -> list[dict[str, Any]]:
    """The timed blocks without those that must not count: excluded at once, or flagged at the end."""
    flagged = {(line["arm"], line["round"]) for line in record.of("flag")}
    blocks = record.of("block")
    return [b for b in blocks if b["excluded"] is None and (b["arm"], b["round"]) not in flagged]


def _commit(record: Record) -> str:
    return (record.run.get("commit") or "no-commit")[:12]
