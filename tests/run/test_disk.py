"""A disk that is full or read-only: one sentence, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import os
import random
import re
from pathlib import Path

import pytest
from skip_guard import conditions

from tests.run.attempts import NEEDS_SPACE, Attempts, Fault, Outcome
from tests.run.conftest import TINY, command
from tests.run.same import assert_same_run, files_of, is_bitwise
from vitprune_fast.distill.training_checkpoints import read_newest
from vitprune_fast.errors import DamagedFile


def refuse(error: DamagedFile) -> None:
    raise error


def contents(folder: Path) -> dict[str, bytes]:
    """What a run goes on from: every file, without the numbers in those that hold times."""
    read = {name: (folder / name).read_bytes() for name in files_of(folder)}
    return {
        name: content if is_bitwise(name) else re.sub(rb"[0-9]+", b"0", content)
        for name, content in read.items()
    }


def fail_and_resume(
    attempts: Attempts,
    short: tuple[Path, Outcome],
    places: list[int],
    number: int,
    tmp_path: Path,
) -> None:
    resumed: dict[str, bytes] = {}
    for at in places:
        folder = tmp_path / f"{errno.errorcode[number]}-{at}"
        words = command(TINY, folder)
        fault = Fault(at, "error", number, kinds=NEEDS_SPACE)
        outcome = attempts.finish(words, fault=fault)
        assert outcome.status == 2, (at, outcome)
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
        assert os.strerror(number) in outcome.err and str(folder) in outcome.err
        for stage in ("dense", "distill"):
            # whatever was written before is whole
            read_newest(folder / "checkpoints" / stage, refuse)
        if (left := contents(folder)) == resumed:
            # a file that could not be made, written, flushed or renamed: the folder is the same
            continue
        resumed = left
        outcome = attempts.finish(words)
        assert outcome.status == 0, (at, outcome.err)
        assert_same_run(short[0], folder)


def operations(short: tuple[Path, Outcome]) -> list[str]:
    return [line for line in short[1].operations if line.split()[0] in NEEDS_SPACE]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_some_operations_fail(
    number: int, attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    some = random.Random(number).sample(range(len(operations(short))), 3)
    fail_and_resume(attempts, short, some, number, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(4))
def test_the_disk_is_full_at_every_file(
    part: int, attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """When a temporary one is written, or renamed; tests/test_files.py has what lies between."""
    every = [
        at
        for at, operation in enumerate(operations(short))
        if not (operation.endswith(".tmp") and operation.split()[0] in ("create", "fsync"))
    ]
    quarter = -(-len(every) // 4)
    mine = every[part * quarter :][:quarter]
    fail_and_resume(attempts, short, mine, errno.ENOSPC, tmp_path)


@pytest.mark.parametrize(("first", "size"), [("full", "300k"), ("read-only", "64m")])
def test_a_real_small_disk(
    first: str, size: str, attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    if conditions()["no-mount"]:
        pytest.skip("this user may not mount")
    folder, copy = tmp_path / "disk", tmp_path / "copy"
    folder.mkdir()
    outcome = attempts.finish(
        command(TINY, folder),
        disk={"folder": str(folder), "first": first, "size": size, "copy": str(copy)},
    )
    assert outcome.status == 0, outcome
    reason = {"full": errno.ENOSPC, "read-only": errno.EROFS}[first]
    assert os.strerror(reason) in outcome.err and outcome.err.count("\n") == 1
    assert_same_run(short[0], copy)
