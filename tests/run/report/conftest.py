from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.conftest import TINY
from vitprune_fast.recipes.start import run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with its report."""
    out = tmp_path_factory.mktemp("report") / "run"
    run(replace(TINY, out=out), command=["vitprune-fast", "run", "--out", "a folder"])
    return out


@pytest.fixture(autouse=True)
def _no_pictures() -> None:
    """Here pictures are drawn."""
