"""docs/api.md: every example runs, one after the other, from a wheel that was installed into an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.M | re.S)
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
RUN = """
import json, pathlib, sys
import adafuse
assert pathlib.Path(adafuse.__file__).is_relative_to(sys.argv[1]), adafuse.__file__
names = {}
for number, block in enumerate(json.loads(pathlib.Path("blocks.json").read_text()), start=1):
    exec(compile(block, f"docs/api.md, example {number}", "exec"), names)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and nothing else; what it stands on is this environment's. Two seconds."""
    clone, target = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", clone / "src", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "conf" / "method", clone / "conf" / "method")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(clone), "--no-deps", "--no-build-isolation", "-w", str(clone)], check=True
    )
    (wheel,) = clone.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.mark.slow
def test_every_example_runs_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    folder = save(tiny_model(num_hidden_layers=2), tmp_path / "models" / "mine")
    (folder / "chat_template.jinja").write_text(CHAT)
    (tmp_path / "blocks.json").write_text(json.dumps(BLOCKS))
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(installed)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_examples_are_short() -> None:
    assert BLOCKS and max(len(block.splitlines()) for block in BLOCKS) <= 10
