"""A run that is killed anywhere and started again gives the bits of one nobody disturbed."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.attempts import Attempts, Fault, Outcome
from tests.run.conftest import TINY, command
from tests.run.same import assert_same_run, files_of, is_bitwise
from vitprune_fast.config.distill import DistillConfig

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
    """
    faults = []
    for at, operation in enumerate(undisturbed.operations):
        faults.append(Fault(at, "before"))
        if operation.startswith("write "):
            faults.append(Fault(at, "torn"))
    return [*faults, Fault(len(undisturbed.operations) - 1, "after")]


def left(folder: Path) -> dict[str, bytes]:
    """What whoever comes next finds: files, and folders as if they were empty ones."""
    found = {folder, *folder.rglob("*")} if folder.exists() else set()
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in found
    }


def of_any_process(found: dict[str, bytes]) -> dict[str, bytes]:
    """The same without files that hold seconds, and process numbers in the names of others."""
    same = {}
    for name, content in found.items():
        # a temporary file holds what the one it becomes does
        becomes = re.sub(r"(^|/)\.([^/]+)\.\d+-\d+\.tmp$", r"\1\2", name)
        shown = re.sub(r"\d+-\d+\.tmp$", "tmp", name)
        same[shown] = content if is_bitwise(becomes) else b""
    return same


@pytest.fixture(scope="module")
def copies(
    attempts: Attempts, short: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """What a kill can leave of the tiny job, besides the folder it ran in."""
    base = tmp_path_factory.mktemp("copies")
    (base / "left").mkdir()
    outcome = attempts.finish(command(TINY, base / "run"), copies=base / "left")
    assert outcome.status == 0 and outcome.operations == short[1].operations
    shutil.move(base / "run", base / "left" / f"{len(outcome.operations) - 1:04}-after")
    yield base / "left"
    # hundreds of megabytes
    shutil.rmtree(base)


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


def goes_on(attempts: Attempts, short: tuple[Path, Outcome], folder: Path, what: object) -> None:
    outcome = attempts.finish(command(TINY, folder))
    assert outcome.status == 0, (what, outcome.err)
    assert_same_run(short[0], folder)


@pytest.mark.parametrize("part", range(2))
def test_a_run_killed_at_some_operations(
    part: int, attempts: Attempts, short: tuple[Path, Outcome], copies: Path
) -> None:
    """And what it leaves is what was copied at that moment."""
    folder = copies.parent / "run"
    for fault in random.Random(part).sample(points(short[1]), 6):
        # under the name that stands in the files of the copies
        shutil.rmtree(folder, ignore_errors=True)
        outcome = attempts.finish(command(TINY, folder), fault=fault)
        assert outcome.status == -signal.SIGKILL, outcome
        assert outcome.operations == short[1].operations[: fault.at + 1], fault
        copy = copies / f"{fault.at:04}-{fault.when}"
        assert of_any_process(left(folder)) == of_any_process(left(copy)), fault
        goes_on(attempts, short, folder, fault)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(8))
def test_a_run_goes_on_from_whatever_a_kill_leaves(
    part: int, attempts: Attempts, short: tuple[Path, Outcome], copies: Path
) -> None:
    seen, different = {}, []
    for fault in points(short[1]):
        copy = copies / f"{fault.at:04}-{fault.when}"
        # nobody can tell that there was a flush, or a removal of what is not there
        if (found := left(copy)) != seen:
            different.append(copy)
        seen = found
    assert len(different) > len(short[1].operations) / 2
    for copy in different[part::8]:
        shutil.rmtree(copies.parent / "run", ignore_errors=True)
        shutil.copytree(copy, copies.parent / "run")
        goes_on(attempts, short, copies.parent / "run", copy.name)
