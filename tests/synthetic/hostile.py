"""Files as an enemy or a bad disk leaves them: a good specimen, damaged; and what a reader may answer.

In: a folder that is right, and a reader of ours. Out: an AssertionError for an input that is neither read nor refused
in one line (ValueError or OSError) that names a file or a key, that hangs, takes a GiB, starts anything or writes
beside its own room. A failing input goes to tests/fuzz/seeds.json, which is tried first. ADAFUSE_SOAK: how many inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adafuse.records import SEAL

SOAK = int(os.environ.get("ADAFUSE_SOAK", 0))
# inputs of a kind in `make test`, nearly 2,000 together; `make soak` has the same shares of its number
SHARES = {
    **{"records": 450, "archives": 250, "membership": 400, "appending": 150, "overrides": 40, "yaml": 40},
    **{"adapters": 60, "peft": 60, "published": 60, "models": 60, "rows": 250, "tasks": 80, "prompts": 150},
}
SEEDS = Path(__file__).parents[1] / "fuzz/seeds.json"
SECONDS, BYTES = 10, 2**30
TRIED, FAILED, SAID = Counter[str](), Counter[str](), list[str]()

DEEP, CODE = "<deep>", "__import__('os').system('touch PWNED')"
ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 2**31, 2**63, -(2**63), 10**30, 10**400, 10**4299),
    *(0.0, -0.5, 0.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "\n",
        "one\ntwo",
        "\x00",
        "\x1b[2J",
        "\u2028",
        "\ud800",
        "é" * 3,
        "x" * 5000,
        "NaN",
        "1e9",
        "true",
    ),
    *(
        "..",
        "../../PWNED",
        "/etc/hostname",
        "/dev/zero",
        "~",
        ".",
        "a/b",
        "C:\\x",
        "%s{0}${oc.env:HOME}",
        DEEP,
    ),
    *(
        CODE,
        f"!!python/object/apply:os.system ['{CODE}']",
        "${oc.create:{_target_: os.getcwd}}",
        "???",
        "${x.y}",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [0],
        [-1, -1],
        [2**40, 2**40],
        {"": ""},
        {"a\nb": 1},
        {"auto_map": {"AutoConfig": "m.C"}},
    ),
]
OF_JSON = ("drop", "retype", "nest", "unnest", "copy", "rename", "add", "shorten", "lengthen")
OF_BYTES = ("cut", "flip", "zero", "insert", "twice", "utf-16", "latin", "mark", "empty", "carriage")
OF_PLACE = ("gone", "FIFO", "folder", "dead link", "loop", "link out", "device")
# which file, what is done, where in it, and with what
Fault = list[Any]
Reader = Callable[[Path], object]


def faults(places: bool) -> st.SearchStrategy[list[Fault]]:
    """One to three damages of one specimen, as plain as JSON."""
    small = st.one_of(
        st.integers(), st.floats(), st.text(max_size=6), st.lists(st.integers(-1, 9), max_size=3)
    )
    how = st.sampled_from((*OF_JSON * 3, *OF_BYTES, *(OF_PLACE if places else ())))
    one = st.tuples(st.integers(0, 63), how, st.integers(0, 2**16), st.one_of(st.sampled_from(ODD), small))
    return st.lists(one.map(list), min_size=1, max_size=3)


def attack(
    kind: str, specimen: Path, read: Reader, room: Path, finish: Reader | None = None, places: bool = True
) -> None:
    """Damage copies of `specimen` and let `read` have them; `finish` makes checksums right again in every other one.

    Without `places` a file stays a file.
    """

    # what libraries keep for good is no input's
    shutil.copytree(specimen, fresh(room) / "room")
    read(room / "input/room")

    def once(chosen: list[Fault]) -> None:
        here = fresh(room)
        folder = here / "room"
        shutil.copytree(specimen, folder)
        (here / "outside").mkdir()
        (here / "outside/file").write_text("{}")
        for fault in chosen:
            damage(folder, fault)
        if finish is not None and chosen[0][2] % 2:
            with_leniency(lambda: finish(folder))
        judge(kind, lambda: read(folder), folder, chosen)

    every(kind, faults(places), once)


def every(kind: str, inputs: st.SearchStrategy[Any], once: Callable[[Any], None]) -> None:
    """The seeds of a kind, then its share of drawn inputs. While soaking nothing stops at the first that fails."""
    count = SHARES[kind] * SOAK // sum(SHARES.values()) if SOAK else SHARES[kind]
    seeds = json.loads(SEEDS.read_text()).get(kind, [])

    def counted(one: Any) -> None:
        TRIED[kind] += 1
        try:
            once(one)
        except AssertionError as error:
            FAILED[kind] += 1
            if not SOAK:
                raise
            SAID.append(f"{kind}: {error}")

    for seed in seeds:
        counted(seed)
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    plain = {"database": None, "deadline": None, "suppress_health_check": slow}
    # without shrinking: a hang would be waited for again and again
    chosen = settings(max_examples=count, derandomize=not SOAK, phases=[Phase.generate], **plain)
    chosen(given(inputs)(counted))()
    assert not FAILED[kind], f"{FAILED[kind]} of {TRIED[kind]} inputs failed, see the summary"


def judge(kind: str, call: Callable[[], object], folder: Path, shown: Any) -> None:
    """Let `call` run; AssertionError unless it ends well, or with one line that names something in `folder`."""
    wrong: list[str] = []
    with watched(folder.parent, wrong), limited():
        try:
            call()
        except (ValueError, OSError) as error:
            wrong += faults_of_refusal(error, folder)
        except (Exception, Hang) as error:
            wrong.append(f"{type(error).__name__}: {str(error)[:300]} ({_place(error)})")
    assert not wrong, f"{wrong[0]}\n  input: {json.dumps(shown, default=str)[:600]}"


def faults_of_refusal(error: Exception, folder: Path) -> list[str]:
    """What is wrong with a refusal: it is another library's, has lines or names nothing."""
    said = str(error)
    if (
        isinstance(error, ValueError)
        and type(error) is not ValueError
        and "adafuse" not in type(error).__module__
    ):
        return [f"{type(error).__name__} of a library: {said[:300]!r} ({_place(error)})"]
    if len(said.splitlines()) != 1 or "\x1b" in said or "\x00" in said:
        return [f"not one line: {said[:300]!r} ({_place(error)})"]
    if len(said) > 2000:
        return [f"a line of {len(said)} characters: {said[:300]!r} ({_place(error)})"]
    # a folder's name, or a key as commands have them
    named = folder.name in said or any(word in said for word in (".path", "runs_dir", "=", "override", "key"))
    return [] if named else [f"names nothing: {said[:300]!r} ({_place(error)})"]


def _place(error: BaseException) -> str:
    trace, last = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/adafuse/" in code.co_filename or "/scripts/" in code.co_filename:
            last = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return last


class Hang(BaseException):
    """Ten seconds went by."""


@contextmanager
def limited() -> Iterator[None]:
    """Ten seconds and one GiB more than now."""

    def late(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    kept = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, kept)


_ROOM: list[tuple[str, list[str]]] = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = (
    "os.system",
    "subprocess.Popen",
    "os.posix_spawn",
    "os.exec",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _ROOM:
        return
    folder, wrong = _ROOM[-1]
    if event in STARTS:
        wrong.append(f"{event} {arguments!r:.200}")
    elif event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
        path = arguments[1 if event in ("os.rename", "os.link", "os.symlink") else 0]
        if event == "os.rename":
            # what has that name goes, and is not followed if it is a link
            path = os.path.join(os.path.realpath(os.path.dirname(path)), "new")
        if isinstance(path, (str, bytes, os.PathLike)) and not _inside(os.fsdecode(path), folder):
            wrong.append(f"{event} writes {os.fsdecode(path)}")
    elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(folder):
        wrong.append(f"code of {arguments[0].co_filename} ran")


def _inside(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(f"{folder}/room") or path == os.devnull or path.endswith(".pyc")


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path, wrong: list[str]) -> Iterator[None]:
    """Note what is started, and what is written anywhere but below `folder`/room."""
    _ROOM.append((os.path.realpath(folder), wrong))
    try:
        yield
    finally:
        _ROOM.pop()


def fresh(room: Path) -> Path:
    """An empty folder for one input, in the place of that of the last."""
    here = room / "input"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    return here


def with_leniency(call: Callable[[], object]) -> None:
    """What is too damaged to be finished stays as it is."""
    try:
        call()
    except Exception:
        return


def damage(folder: Path, fault: Fault) -> None:
    """Do one damage to one file of a folder."""
    number, how, at, value = fault
    files = sorted(
        path for path in folder.rglob("*") if not path.is_dir() and not path.is_symlink() and path.is_file()
    )
    if not files:
        return
    file = files[number % len(files)]
    if how in OF_PLACE:
        displace(file, how, folder.parent / "outside")
        return
    data = file.read_bytes()
    changed = None
    if how in OF_JSON:
        try:
            changed = of_format(file.suffix)(data, lambda tree: edited(tree, how, at, value))
        except Exception:  # what an earlier damage left has no structure any more
            how = OF_BYTES[at % len(OF_BYTES)]
    file.write_bytes(damaged(data, how, at, value) if changed is None else changed)


def displace(file: Path, how: str, outside: Path) -> None:
    """Something else than a file in its place."""
    data = file.read_bytes()
    file.unlink()
    if how == "FIFO":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "dead link":
        file.symlink_to("nowhere")
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "link out":
        (outside / file.name).write_bytes(data)
        file.symlink_to(outside / file.name)


def damaged(data: bytes, how: str, at: int, value: Any) -> bytes:
    """Other bytes."""
    place = at % (len(data) + 1)
    extra = (str(value)[:200] if not isinstance(value, int) or abs(value) < 1e9 else "9" * 200).encode(
        "utf-8", "replace"
    )
    made = {
        "cut": data[:place],
        "flip": data[:place]
        + bytes(byte ^ (1 << at % 8) for byte in data[place : place + 1])
        + data[place + 1 :],
        "zero": data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :],
        "insert": data[:place] + extra + data[place:],
        "twice": data[:place] + data,
        "mark": b"\xef\xbb\xbf" + data,
        "empty": b"",
        "carriage": data.replace(b"\n", b"\r"),
        "latin": data[:place] + "é\xff".encode("latin-1") + data[place:],
    }
    return made[how] if how in made else data.decode("latin-1").encode("utf-16")


Change = Callable[[Any], Any]


def of_format(suffix: str) -> Callable[[bytes, Change], bytes]:
    """How a file of this kind is taken apart and put together."""
    known = {".json": _json, ".jsonl": _lines, ".partial": _lines, ".safetensors": _tensors}
    return (known | {".yaml": _yaml, ".csv": _table, ".parquet": _parquet})[suffix]


def text_of(tree: Any) -> str:
    """JSON, in which a leaf may be nested deeper than Python goes."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    finally:
        sys.set_int_max_str_digits(4300)


def _json(data: bytes, change: Change) -> bytes:
    return text_of(change(json.loads(data))).encode()


def _lines(data: bytes, change: Change) -> bytes:
    trees = change([json.loads(line) for line in data.splitlines()])
    return b"".join(text_of(tree).encode() + b"\n" for tree in trees)


def _tensors(data: bytes, change: Change) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text = text_of(change(json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _yaml(data: bytes, change: Change) -> bytes:
    return yaml.dump(change(yaml.safe_load(data)), sort_keys=False).encode("utf-8", "surrogatepass")


def _table(data: bytes, change: Change) -> bytes:
    rows = change([line.split(",") for line in data.decode().split("\n")])
    return "\n".join(",".join(map(str, row)) for row in rows).encode("utf-8", "surrogatepass")


def _parquet(data: bytes, change: Change) -> bytes:
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    plain = change(
        [{k: v.decode("latin-1") if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
    )
    for row in plain:
        if isinstance(row.get("content"), str):
            row["content"] = row["content"].encode("latin-1")
            row["sha256"] = hashlib.sha256(row["content"]).hexdigest()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(plain), sink)
    return sink.getvalue().to_pybytes()


def edited(tree: Any, how: str, at: int, value: Any) -> Any:
    """A tree with one of its places changed."""
    places = list(_places(tree))
    if not places:
        return value
    node, key = places[at % len(places)]
    old = node[key]
    if how == "retype":
        node[key] = value
    elif how == "nest":
        node[key] = [old] if at % 2 else {"x": old}
    elif how == "unnest":
        node[key] = (
            next(iter(old.values() if isinstance(old, dict) else old), None)
            if isinstance(old, dict | list)
            else str(old)
        )
    elif how == "shorten":
        node[key] = old[:-1] if isinstance(old, list | str) else {}
    elif how == "lengthen":
        node[key] = old + old if isinstance(old, list | str | int) else [old, old]
    elif how in ("copy", "add"):
        _put(node, key, old if how == "copy" else value, f"{key}{value}"[:40] if at % 3 else str(value)[:40])
    elif how == "rename" and isinstance(node, dict):
        node[str(value)[:60]] = node.pop(key)
    else:
        del node[key]
    return tree


def _put(node: Any, key: Any, value: Any, name: str) -> None:
    if isinstance(node, dict):
        node[name] = value
    else:
        node.insert(key, value)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, its outer ones first."""
    below = [tree]
    while below:
        node = below.pop(0)
        for key in (
            list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            yield node, key
            below.append(node[key])


def seal(file: Path) -> None:
    """The checksum that a record's bytes now have."""
    if not file.is_file():
        return
    body = file.read_bytes().rpartition(SEAL)[0]
    file.write_bytes(body + SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n')
