"""The mirror in Weights & Biases: one finished record becomes one run, after everything was timed.

In: the path of a finished record, the tracker's name, the cell's own settings. Out: nothing here; the record stays the
only source of the report. Without a key the run is written below runs_dir, for `wandb sync`. A run's id is its cell's,
so that a second upload meets the first; it names no host and no absolute path, unless tracker=wandb_full asks for them.
tracker=trackio writes the same for a local page without an account.
Next: report/__init__.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from netrc import NetrcParseError, netrc
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from adafuse.paths import without_paths
from adafuse.records import Record, card, read

if TYPE_CHECKING:
    import wandb

PROJECT = "adafuse"
TRACKERS = ("off", "wandb", "wandb_full", "trackio")
BLOCK_COLUMNS = ["arm", "round", "position", "tokens", "block_ms", "excluded"]
ARM_COLUMNS = ["arm", "ms_per_token", "low", "high", "blocks"]
TASK_COLUMNS = ["suite_task", "metric", "value", "stderr", "n"]
# what a fit's lines are called by transformers' own callback
CURVES = {name: f"train/{name}" for name in ("loss", "balance_loss", "learning_rate", "grad_norm")}
STEP = "train/global_step"
# who started what where, and on what else the machine was busy: nobody's business
PRIVATE: dict[str, Any] = {
    "host": "",
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
_said: set[str] = set()


def track(record_path: Path, tracker: str, settings: dict[str, Any] | None = None) -> None:
    """Mirror a finished record, once; `settings` are those that its cell depends on.

    Raises ValueError with one line for an unknown tracker or a refused login.
    """
    if tracker == "off":
        return
    if tracker not in TRACKERS:
        raise ValueError(f"unknown tracker '{tracker}': choose from {', '.join(TRACKERS)}")
    record = read(record_path)
    if record.status == "unfinished":
        raise ValueError(f"record {record_path} is unfinished: only finished records are tracked")
    if os.environ.get("WANDB_MODE") == "disabled" and tracker != "trackio":
        # nothing would be written, and a mark would say that it was
        return
    full = tracker == "wandb_full"
    named = run_settings(record, settings, full=full)
    library = tracker.removesuffix("_full")
    folder = Path(os.environ.get("WANDB_DIR") or record.run["config"].get("runs_dir", "."))
    # this very record was mirrored already, and not one that its cell had before
    mark = folder / library / "mirrored" / named["id"]
    if mark.exists() and mark.stat().st_mtime >= record_path.stat().st_mtime:
        return
    mark.parent.mkdir(parents=True, exist_ok=True)
    if library == "wandb":
        _to_wandb(record, folder, named, full)
    else:
        _to_trackio(record, folder, named)
    mark.touch()


def _to_wandb(record: Record, folder: Path, named: dict[str, Any], full: bool) -> None:
    try:
        import wandb
    except ImportError:
        raise ValueError("tracker=wandb needs wandb: pip install wandb, or use tracker=off") from None
    # of artifacts; else below the user's home
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "data"))
    figures = dict(_figures(record))
    # A trainer that reports by itself leaves its run open; ours must not be mixed into it.
    options: dict[str, Any] = {"dir": str(folder), "reinit": "finish_previous", "mode": _mode(folder)}
    silent = wandb.Settings(silent=True, console="off", **({} if full else PRIVATE))
    try:
        with wandb.init(**named, **options, settings=silent) as run:
            run.define_metric(STEP)
            run.define_metric("train/*", step_metric=STEP)
            _log(run, wandb, record, figures)
            run.summary.update(summary(record))
            _keep(run, record, full)
    except wandb.errors.Error as exc:
        reason = " ".join(str(exc).split())
        raise ValueError(f"tracker=wandb: {reason}; set WANDB_MODE=offline or use tracker=off") from exc
    finally:
        # Everything is on disk, and no service of the tracker runs beside the next timed cell.
        wandb.teardown()


def _to_trackio(record: Record, folder: Path, named: dict[str, Any]) -> None:
    """The same without an account: `trackio show` finds it in TRACKIO_DIR, which is below runs_dir."""
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    try:
        import trackio
    except ImportError:
        raise ValueError("tracker=trackio needs trackio: pip install trackio, or use tracker=off") from None
    about = {name: named[name] for name in ("job_type", "tags", "id")}
    alone: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    with redirect_stdout(StringIO()):
        run = trackio.init(
            **{name: named[name] for name in ("project", "name", "group")},
            config=named["config"] | about,
            **alone,
        )
        _log(run, trackio, record, dict(_figures(record)))
        run.log(summary(record))
        run.finish()


def _mode(folder: Path) -> str | None:
    """`offline`, said once, where nobody has logged in or chosen; else None, and wandb's own settings hold."""
    if os.environ.get("WANDB_MODE") or _has_key():
        return None
    line = f"tracker=wandb: no key here, so runs stay in {folder / 'wandb'}; wandb login and wandb sync upload them"
    if line not in _said:
        print(line)
    _said.add(line)
    return "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        return netrc(file).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _log(run: Any, library: Any, record: Record, figures: dict[str, Any]) -> None:
    """Curves, tables and figures, in the words that wandb and trackio share."""
    for line in record.of("loss"):
        curves = {shown: line[name] for name, shown in CURVES.items() if line.get(name) is not None}
        run.log(curves | {STEP: line["step"]}, step=line["step"])
    tables = {name: library.Table(columns=columns, data=rows) for name, columns, rows in _tables(record)}
    drawn = {f"figures/{name}": library.Image(figure) for name, figure in figures.items()}
    if tables or drawn:
        run.log(tables | drawn)


def _keep(run: wandb.Run, record: Record, full: bool) -> None:
    """The record and the Chrome traces that it names, as artifacts."""
    import wandb

    kept = wandb.Artifact(_artifact(record.run["cell_id"]), "record", metadata={"paths": full})
    with kept.new_file(record.path.name, mode="w") as file:
        file.write(record.data.decode() if full else "".join(map(_shown, record.lines)))
    run.log_artifact(kept, aliases=[_commit(record)])
    traces = [Path(line["path"]) for line in record.of("artifact") if line["path"].endswith(".json.gz")]
    if traces:
        chrome = wandb.Artifact(_artifact(f"{record.run['cell_id']}-trace"), "trace")
        for path in filter(Path.is_file, traces):
            chrome.add_file(str(path), name=path.name)
        run.log_artifact(chrome, aliases=[_commit(record)])


def _shown(line: dict[str, Any]) -> str:
    return json.dumps(_cut(line)) + "\n"


def _cut(value: Any) -> Any:
    """Plain values without paths of this machine."""
    if isinstance(value, dict):
        return {name: _cut(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner) for inner in value]
    return without_paths(value) if isinstance(value, str) else value


def _tables(record: Record) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """What has rows: name, columns and data."""
    blocks = [
        [block[name] for name in BLOCK_COLUMNS[:-1]] + [str(block["excluded"])]
        for block in record.of("block")
    ]
    scores = [[line[name] for name in TASK_COLUMNS] for line in record.of("metric")]
    arms = [[arm, *ends] for arm, ends in _arms(record).items()]
    found = (
        ("blocks", BLOCK_COLUMNS, blocks),
        ("latency", ARM_COLUMNS, arms),
        ("accuracy", TASK_COLUMNS, scores),
    )
    return ((name, columns, rows) for name, columns, rows in found if rows)


def _figures(record: Record) -> Iterator[tuple[str, Any]]:
    """The report's figures as images, as far as one record gives any."""
    import matplotlib as mpl
    from PIL import Image

    from adafuse.report import build, figures

    try:
        planned = figures.plan(build([record]))
    except ValueError:
        return
    with mpl.rc_context(figures.look()["style"]):
        for own in planned:
            drawn = BytesIO()
            figures.DRAW[own.spec["kind"]](own).savefig(drawn, dpi=150)
            yield Path(own.file).stem, Image.open(drawn)


def run_settings(
    record: Record, settings: dict[str, Any] | None = None, *, full: bool = False
) -> dict[str, Any]:
    """What names the run: group = experiment, job = task, name = cell; its id is that of cell and card (or machine)."""
    run, config = record.run, record.run["config"]
    arms = config.get("arms", {}) if run["task"] in ("latency", "memory", "trace") else {}
    methods = [arms["table"][arm]["method"] for arm in arms.get("run", [])]
    methods = methods or [config.get("method", {}).get("name")]
    machine = run["machine"].get("name")
    tags = [run.get("profile"), *dict.fromkeys(methods), machine, config.get("model", {}).get("name")]
    about = {name: run.get(name) for name in ("profile", "seed", "replicate", "commit", "dirty", "versions")}
    named = {
        "project": PROJECT,
        "group": run.get("experiment") or run["task"],
        "job_type": run["task"],
        "name": run["cell_id"],
        "id": f"{run['config_hash']}-{card(run) or machine}",
        # wandb refuses tags of more than 64 characters
        "tags": list(dict.fromkeys(str(tag)[:64] for tag in tags if tag)),
        "config": {**about, "machine": run["machine"], **(settings or config)},
    }
    return named if full else {name: _cut(value) for name, value in named.items()}


def summary(record: Record) -> dict[str, Any]:
    """One number per name: accuracies, checks failed, and the median ms per token of each arm with its interval."""
    found: dict[str, Any] = {"status": record.status, "errors": len(record.of("error"))}
    for line in record.of("metric"):
        name = f"{line['suite_task']}/{line['metric']}"
        found |= {name: line["value"], f"{name}/stderr": line["stderr"]}
    found["failed_checks"] = sum(not check["passed"] for check in record.of("check"))
    for arm, (middle, low, high, _) in _arms(record).items():
        name = f"ms_per_token/{arm}"
        found |= {name: middle, f"{name}/low": low, f"{name}/high": high}
    return {name: value for name, value in found.items() if value is not None}


def _arms(record: Record) -> dict[str, tuple[float, float, float, int]]:
    """Median ms a token, its interval over this process's rounds, and how many blocks count."""
    from adafuse.stats import paired_ratio

    times_ms: dict[str, list[float]] = {}
    for block in _counted(record):
        times_ms.setdefault(block["arm"], []).append(block["block_ms"] / block["tokens"])
    ends = {arm: paired_ratio([(ms, [1.0] * len(ms))]) for arm, ms in sorted(times_ms.items())}
    return {arm: (median(times_ms[arm]), one.low, one.high, one.n_rounds) for arm, one in ends.items()}


def _counted(record: Record) -> list[dict[str, Any]]:
    """The timed blocks without those that must not count: excluded at once, or flagged at the end."""
    flagged = {(line["arm"], line["round"]) for line in record.of("flag")}
    blocks = record.of("block")
    return [b for b in blocks if b["excluded"] is None and (b["arm"], b["round"]) not in flagged]


def _artifact(name: str) -> str:
    """As wandb takes the name of an artifact."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _commit(record: Record) -> str:
    return (record.run.get("commit") or "no-commit")[:12]
