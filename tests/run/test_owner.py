"""One process owns a run folder, and hands it on whole, however it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.attempts import Attempt, Attempts, Outcome, alive
from tests.run.conftest import TINY, command
from tests.run.same import assert_same_run, summary_without_times
from vitprune_fast.config.run import RunConfig

SLOW = replace(TINY, distill=replace(TINY.distill, epochs=400, checkpoint_steps=0))
"""The tiny job with a training that is still going on when somebody wants to stop it."""


def one_sentence(text: str) -> str:
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_a_second_process_is_refused_at_once(
    attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    words, go_on = command(TINY, tmp_path / "run"), tmp_path / "go on"
    owner = attempts.start(words, hold=go_on)
    assert owner.wait_for(lambda events: any(e[0] == "stage" for e in events))
    second = attempts.finish(words)
    # it did not wait for the owner, who waits for a file
    assert second.status == 2 and alive(owner.pid)
    sentence = one_sentence(second.err)
    assert f"is in use by process {owner.pid} on {socket.gethostname()}" in sentence
    go_on.touch()
    assert owner.wait().status == 0
    assert_same_run(short[0], tmp_path / "run")


def test_the_lock_of_a_dead_owner_is_taken_over(
    attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    words = command(TINY, tmp_path / "run")
    owner = attempts.start(words, hold=tmp_path / "never")
    assert owner.wait_for(lambda events: any(e[0] == "stage" for e in events))
    assert str(owner.pid) in (tmp_path / "run" / ".lock").read_text()
    # not waited for: the new one may meet a process that is not quite gone
    owner.signal(signal.SIGKILL)
    assert attempts.finish(words).status == 0
    assert owner.wait().status == -signal.SIGKILL
    assert_same_run(short[0], tmp_path / "run")


def test_loader_processes_do_not_keep_the_lock(attempts: Attempts, tmp_path: Path) -> None:
    """They outlive a killed run for a while, and were forked while it held the lock."""
    config = replace(SLOW, data=replace(TINY.data, workers=2))
    words = command(config, tmp_path / "run")
    owner = attempts.start(words)
    assert owner.wait_for(lambda events: any(e[:2] == ("step", "dense") for e in events))
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    assert children
    # stopped, they cannot notice that their parent is gone
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    try:
        owner.kill()
        assert all(alive(int(child)) for child in children)
        again = attempts.start(words, hold=tmp_path / "never")
        assert again.wait_for(lambda events: any(e[0] == "stage" for e in events)), again.wait()
        again.kill()
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_of_twenty_starts_one_owns_the_folder(
    attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    words, go_on = command(TINY, tmp_path / "run"), tmp_path / "go on"
    started = [attempts.start(words, hold=go_on) for _ in range(20)]
    while sum(alive(each.pid) for each in started) > 1:
        time.sleep(0.01)
    go_on.touch()
    outcomes = {each.pid: each.wait() for each in started}
    owners = [pid for pid, outcome in outcomes.items() if outcome.status == 0]
    assert len(owners) == 1
    for pid, outcome in outcomes.items():
        if pid not in owners:
            assert outcome.status == 2
            assert f"in use by process {owners[0]} on" in one_sentence(outcome.err)
            assert not [o for o in outcome.operations if o not in ("mkdir ", "create .lock")]
    assert_same_run(short[0], tmp_path / "run")


def in_distillation(attempt: Attempt) -> bool:
    return attempt.wait_for(lambda events: any(e[:2] == ("step", "distill") for e in events))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(
    number: signal.Signals, attempts: Attempts, tmp_path: Path
) -> None:
    """The second command stops the job a second time, where no checkpoint would be due."""
    words, folder = command(SLOW, tmp_path / "run"), tmp_path / "run"
    for _ in range(2):
        attempt = attempts.start(words)
        assert in_distillation(attempt)
        attempt.signal(number)
        outcome = attempt.wait()
        # 143 for SIGTERM
        assert outcome.status == 128 + number
        assert outcome.err == f"stopped by {number.name}; the same command resumes the run\n"
        last = max(step for _, stage, step, _ in outcome.events if stage == "distill")
        assert (folder / "checkpoints" / "distill" / f"step-{last:08}.json").exists()
    resumed = attempts.start(words)
    assert resumed.wait_for(lambda events: any(e[0] == "resume" for e in events))
    resumed.kill()
    assert ["resume", last] in [[e[0], e[2]] for e in resumed.events()]


def test_a_stopped_run_ends_with_the_same_bits(
    attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    config: RunConfig = replace(TINY, distill=replace(TINY.distill, epochs=30))
    other, folder = tmp_path / "other", tmp_path / "run"
    assert attempts.finish(command(config, other)).status == 0
    words = command(config, folder)
    attempt = attempts.start(words)
    assert in_distillation(attempt)
    attempt.signal(signal.SIGTERM)
    assert attempt.wait().status == 143
    assert attempts.finish(words).status == 0
    # stopping early in a training leaves no trace: its checkpoint is long gone
    assert_same_run(other, folder)
    assert summary_without_times(folder) != summary_without_times(short[0])
    assert re.fullmatch(r"process \d+ on .+\n", (folder / ".lock").read_text())
