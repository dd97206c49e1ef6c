"""A run of several processes: one folder, which the first of them owns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.conftest import TINY
from tests.run.same import assert_same_run
from vitprune_fast.errors import RunFolderError
from vitprune_fast.recipes.start import run

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.run.conftest import TINY, undrawn
from vitprune_fast.recipes.start import RunStopped, run
from vitprune_fast.run.report import figures

figures.drawn = undrawn
out, seed, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
events = []

def stop():
    return any(e["event"] == "step" and e["stage"] == end for e in events)

try:
    summary = run(replace(TINY, out=out, seed=seed), on_event=events.append, stop=stop)
    print(summary["after"]["top1_count"])
except RunStopped:
    print("stopped")
print(len(events))
"""


def start(out: Path, port: int, *, seed: int = 0, end: str = "never") -> list[list[str]]:
    """What each of two processes prints, or how the run failed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(out), str(seed), end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    return [
        out.split() if process.returncode == 0 else [err.strip().splitlines()[-1]]
        for process, (out, err) in zip(processes, said, strict=True)
    ]


@pytest.fixture(scope="module")
def port() -> int:
    # apart by the workers of pytest
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return 29_700 + int(number)


def test_two_processes_make_one_run_and_resume_it(port: int, tmp_path: Path) -> None:
    first, second = start(tmp_path / "one", port)
    # the first speaks for both, and both know what came of it
    assert int(first[1]) > 20 and second[1] == "0" and first[0] == second[0]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert first[0] == str(summary["after"]["top1_count"])
    identity = json.loads((tmp_path / "one" / "run.json").read_text())["identity"]
    assert identity["processes"] == 2
    assert start(tmp_path / "two", port, end="score")[1][0] == "stopped"
    assert start(tmp_path / "two", port)[1][0] == first[0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    # one process would train with other batches
    with pytest.raises(RunFolderError, match="processes: 2 -> absent"):
        run(replace(TINY, out=tmp_path / "two"))


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(port: int, tmp_path: Path) -> None:
    start(tmp_path / "run", port, end="dense")
    refused = start(tmp_path / "run", port, seed=1)
    assert all("RunFolderError" in said[0] for said in refused), refused
