"""A run of several processes: one folder, which the first of them owns."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.processes import outcomes
from tests.run.conftest import TINY, undrawn
from tests.run.same import assert_same_run
from vitprune_fast.errors import RunFolderError
from vitprune_fast.recipes.start import RunStopped, run
from vitprune_fast.run.report import figures


def share(rank: int, out: Path, seed: int, end: str) -> tuple[str, int]:
    """How the run ended in this process, and how many events it had."""
    figures.drawn = undrawn
    events: list[dict[str, Any]] = []

    def stop() -> bool:
        return any(e["event"] == "step" and e["stage"] == end for e in events)

    try:
        summary = run(replace(TINY, out=out, seed=seed), on_event=events.append, stop=stop)
    except RunStopped:
        return "stopped", len(events)
    return str(summary["after"]["top1_count"]), len(events)


def start(out: Path, port: int, *, seed: int = 0, end: str = "never") -> list[tuple[bool, Any]]:
    """What came of it in each of two processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return outcomes(2, share, out, seed, end, environment=address)


@pytest.fixture(scope="module")
def port() -> int:
    # apart by the workers of pytest
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return 29_700 + int(number)


def test_two_processes_make_one_run_and_resume_it(port: int, tmp_path: Path) -> None:
    (_, first), (_, second) = start(tmp_path / "one", port)
    # the first speaks for both, and both know what came of it
    assert first[1] > 20 and second == (first[0], 0)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert first[0] == str(summary["after"]["top1_count"])
    identity = json.loads((tmp_path / "one" / "run.json").read_text())["identity"]
    assert identity["processes"] == 2
    assert start(tmp_path / "two", port, end="score")[1] == (True, ("stopped", 0))
    assert start(tmp_path / "two", port)[1] == (True, second)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    # one process would train with other batches
    with pytest.raises(RunFolderError, match="processes: 2 -> absent"):
        run(replace(TINY, out=tmp_path / "two"))


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(port: int, tmp_path: Path) -> None:
    start(tmp_path / "run", port, end="dense")
    refused = start(tmp_path / "run", port, seed=1)
    assert all(not done and "RunFolderError" in said for done, said in refused), refused
