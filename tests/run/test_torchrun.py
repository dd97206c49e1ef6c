"""Runs that `torchrun` starts: a process that is killed takes the others along, and no bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.attempts import alive
from tests.run.conftest import TINY, command
from tests.run.same import assert_same_run
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.run import ScoreConfig, SweepConfig

WORLD = 2
LONG = DistillConfig(epochs=8, warmup_epochs=1, log_steps=1, checkpoint_steps=3)
# so many micro-batches, images and steps that there is time to die between them
SLOW = ScoreConfig(samples=1000, batch_size=1)
CONFIG = replace(
    TINY,
    data=replace(TINY.data, batch_size=64),
    dense=LONG,
    score=SLOW,
    sweep=SweepConfig(images=1000),
    distill=replace(LONG, keep="best"),
)


def start(folder: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    """Of so many processes, each of which has so many that read images."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    words = [*launcher, "-m", "vitprune_fast", *command(CONFIG, folder), "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen([sys.executable, "-m", *words], env=environment, stdout=log, stderr=log)


def processes_of(launcher: int) -> dict[int, int]:
    """Rank -> process."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in map(int, children):
        setting = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(word[5:]) for word in setting if word.startswith(b"RANK=")]
        found |= dict.fromkeys(ranks, child)
    return found


def kill(folder: Path, workers: int, rank: int, there: Callable[[], bool]) -> None:
    """Starts the run, kills one of its processes when something is there, and waits for the end."""
    launcher = start(folder, workers)
    while not there():
        assert launcher.poll() is None, folder.with_suffix(".log").read_text()
        time.sleep(0.001)
    started = processes_of(launcher.pid)
    assert len(started) == WORLD
    os.kill(started[rank], signal.SIGKILL)
    # by themselves they would wait for half an hour
    assert launcher.wait(300) != 0
    assert not any(map(alive, started.values()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_process_ends_the_others_and_the_command_goes_on(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0, whole.with_suffix(".log").read_text()
    stages = folder / "stages"
    deaths = {
        "dense": (2, 1, lambda: any(folder.glob("checkpoints/dense/step-*.json"))),
        "score": (4, 0, lambda: (stages / "dense.json").exists()),
        "sweep": (2, 1, lambda: (stages / "prune.json").exists()),
        "distill": (0, 0, lambda: any(folder.glob("checkpoints/distill/step-*.json"))),
    }
    for step, death in deaths.items():
        kill(folder, *death)
        assert not (stages / f"{step}.json").exists(), f"{step} was over when the kill came"
    assert start(folder).wait() == 0, folder.with_suffix(".log").read_text()
    assert_same_run(whole, folder)
