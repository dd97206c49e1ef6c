"""A run that is killed anywhere and started again gives the bits of one nobody disturbed."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipes.attempts import Attempts, Fault, Outcome
from tests.recipes.conftest import TINY, command
from tests.recipes.same import assert_same_run, files_of
from vitprune_fast.distill.config import DistillConfig

LONG = DistillConfig(epochs=16, warmup_epochs=1, log_steps=1, checkpoint_steps=3)
SMOKE = replace(TINY, data=replace(TINY.data, batch_size=128), dense=LONG, distill=LONG)
"""The tiny job with 128 steps in both trainings, so that many kills fit in."""


@pytest.fixture(scope="module")
def smoke(attempts: Attempts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke job, undisturbed."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    assert attempts.finish(command(SMOKE, folder)).status == 0
    return folder


def moments(chance: random.Random) -> list[tuple[str, str, int | float]]:
    """Twenty times to die: (how, where, when)."""
    halves = []
    for stage in ("dense", "distill"):
        half: list[tuple[str, str, int | float]] = [
            ("step", stage, chance.randint(2, 8)) for _ in range(6)
        ]
        half += [("write", stage, chance.randint(0, 7)) for _ in range(3)]
        chance.shuffle(half)
        halves += [*half, ("time", "", chance.uniform(0, 0.1))]
    return halves


def test_a_run_killed_twenty_times_in_a_row(
    attempts: Attempts, smoke: Path, tmp_path: Path
) -> None:
    chance = random.Random(20)
    words = command(SMOKE, tmp_path / "run")
    in_training = in_write = 0
    for how, stage, when in moments(chance):
        if how == "write":
            fault = Fault(int(when), "torn", kinds=("write",), after_step_of=stage)
            outcome = attempts.finish(words, fault=fault)
            in_write += 1
        else:
            attempt = attempts.start(words)
            if how == "step":
                steps = int(when)
                assert attempt.wait_for(
                    lambda events, stage=stage, steps=steps: (
                        sum(e[:2] == ("step", stage) for e in events) >= steps
                    )
                ), f"{stage} ended too early"
                # somewhere inside a step, a checkpoint, a validation pass
                time.sleep(chance.uniform(0, 0.01))
            else:
                assert attempt.wait_for(bool)
                time.sleep(when)
            attempt.signal(signal.SIGKILL)
            outcome = attempt.wait()
            in_training += outcome.in_training
        assert outcome.status == -signal.SIGKILL, outcome
    assert in_training >= 8 and in_write >= 3
    outcome = attempts.finish(words)
    assert outcome.status == 0, outcome.err
    assert_same_run(smoke, tmp_path / "run")


def points(undisturbed: Outcome) -> list[Fault]:
    """Between any two operations, and in the middle of each write.

    After one operation is before the next: the process does nothing to the folder between them.
    Behind an operation that had no effect, the folder is as it was before it.
    """
    faults = []
    for at, operation in enumerate(undisturbed.operations):
        if at - 1 not in undisturbed.without_effect:
            faults.append(Fault(at, "before"))
        if operation.startswith("write "):
            faults.append(Fault(at, "torn"))
    return [*faults, Fault(len(undisturbed.operations) - 1, "after")]


def kill_and_resume(
    attempts: Attempts, short: tuple[Path, Outcome], faults: list[Fault], tmp_path: Path
) -> None:
    undisturbed, operations = short[0], short[1].operations
    for fault in faults:
        folder = tmp_path / f"{fault.when}-{fault.at}"
        words = command(TINY, folder)
        outcome = attempts.finish(words, fault=fault)
        assert outcome.status == -signal.SIGKILL, outcome
        assert outcome.operations == operations[: fault.at + 1], fault
        outcome = attempts.finish(words)
        assert outcome.status == 0, (fault, operations[fault.at], outcome.err)
        assert_same_run(undisturbed, folder)


def test_the_kill_points_are_all_that_a_run_does_to_its_folder(
    short: tuple[Path, Outcome],
) -> None:
    """An operation that escapes the hooks would not be tested."""
    folder, operations = short[0], short[1].operations
    kinds = {line.split()[0] for line in operations}
    assert kinds == {"create", "write", "fsync", "rename", "mkdir", "unlink"}
    count = {kind: sum(line.startswith(f"{kind} ") for line in operations) for kind in kinds}
    appended = operations.count("write metrics.jsonl")
    # two epochs of each training, and what the distillation started from
    assert appended == 5
    # all else is written to a temporary file, flushed and renamed, and its folder flushed
    written = count["write"] - appended - operations.count("write .lock")
    folders_replaced = 4
    assert count["rename"] == written + folders_replaced
    assert count["fsync"] == 2 * written + appended + 1 + folders_replaced
    kept = [name for name in files_of(folder) if name not in ("metrics.jsonl", ".lock")]
    assert written >= len(kept)
    idle = [operations[at].split()[0] for at in short[1].without_effect]
    assert set(idle) == {"fsync", "unlink", "mkdir"} and idle.count("fsync") == count["fsync"]


@pytest.mark.parametrize("part", range(2))
def test_a_run_killed_at_some_operations(
    part: int, attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    some = random.Random(part).sample(points(short[1]), 6)
    kill_and_resume(attempts, short, some, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(8))
def test_a_run_killed_at_every_operation(
    part: int, attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    kill_and_resume(attempts, short, points(short[1])[part::8], tmp_path)
