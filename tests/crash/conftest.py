"""The study that nothing disturbed, against which the others are held."""

from pathlib import Path
from typing import Any

import pytest

from synthetic import whole


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, said = whole.whole(folder)
    assert status == 0, said
    return folder


@pytest.fixture(scope="session")
def undisturbed(study: Path) -> dict[str, Any]:
    return whole.told(study)
