"""Processes that stop together go on together, however slow the one is that writes the file."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.processes import outcomes, together
from tests.surgery.test_moments import heads_and_neurons
from vitprune_fast import sealed
from vitprune_fast.distill import training_checkpoints
from vitprune_fast.files import write_tensors
from vitprune_fast.scoring import ScoringStopped
from vitprune_fast.search import SearchStopped
from vitprune_fast.surgery import SweepStopped
from vitprune_fast.testing import random_images, random_vit

VERBS = ("score", "prune", "search", "distill")
STOPPED = (ScoringStopped, SweepStopped, SearchStopped)


def work(verb: str, place: Path | None, after: int | None) -> tuple[int, bool]:
    """Do some of the work, or the rest of it.

    Args:
        verb: which.
        place: of the checkpoint, or None.
        after: how often it is asked whether to stop before it has to; None never has to.

    Returns:
        How often it asked, and whether it came to its end.
    """
    model, asked = random_vit(dtype=torch.float32), []
    images = random_images(model, 40)
    batches = list(zip(images.split(4), (torch.arange(40) % 5).split(4), strict=True))

    def stop() -> bool:
        asked.append(None)
        return len(asked) == after

    more: dict[str, Any] = {"stop": stop}
    try:
        if verb == "distill":
            config = vp.DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3, log_steps=1)
            more["checkpoint_dir"] = place
            finished = vp.distill(model, None, batches, None, config, **more).finished
            return len(asked), finished
        more["checkpoint"] = place
        if verb == "score":
            vp.score(model, batches, **more)
        elif verb == "prune":
            vp.prune(model, heads_and_neurons(model), calibration=images, **more)
        else:
            scores = vp.score(model, None, criterion="magnitude")
            vp.search(model, scores, batches, mode="equal-macs", macs=0.7, **more)
    except STOPPED:
        return len(asked), False
    return len(asked), True


def slow(tensors: Any, *rest: Any) -> None:
    time.sleep(1)
    write_tensors(tensors, *rest)


def broken(*_: Any) -> None:
    raise OSError("no space")


def stop_and_go_on(rank: int, verb: str, place: Path) -> list[Any]:
    if rank == 0:
        sealed.write_tensors = training_checkpoints.write_tensors = slow
    return [work(verb, place, 2), work(verb, place, None), work(verb, place, None)]


def go_on_alone(rank: int, verb: str, folder: Path) -> None:
    """Go on, the second process at a place where nothing is."""
    place = folder / "shared"
    work(verb, place, 2)
    work(verb, place if rank == 0 else folder / "own", None)


def begin_alone(rank: int, verb: str, place: Path) -> None:
    """Name a checkpoint in the first process only, which is the one that writes."""
    work(verb, place if rank == 0 else None, None)


def fail_to_write(rank: int, verb: str, place: Path, after: int | None) -> None:
    if after is None:
        sealed.EVERY_S = 0.0
    if rank == 0:
        sealed.write_tensors = training_checkpoints.write_tensors = broken
    work(verb, place, after)


@pytest.mark.parametrize("verb", VERBS)
def test_the_next_call_finds_what_the_first_process_wrote(verb: str, tmp_path: Path) -> None:
    found, other = together(2, stop_and_go_on, verb, tmp_path / "kept", store=tmp_path / "store")
    assert found == other
    (before, was_ended), (rest, is_ended), again = found
    assert (before, was_ended, is_ended) == (2, False, True) and rest
    # the file of finished work is gone, for both
    assert again[1]


@pytest.mark.parametrize("verb", VERBS)
def test_processes_that_read_other_files_are_refused(verb: str, tmp_path: Path) -> None:
    found = outcomes(2, go_on_alone, verb, tmp_path, store=tmp_path / "store")
    for succeeded, said in found:
        assert not succeeded
        assert re.search(
            rf"StageFailed: {verb}: checkpoint\w* must hold as many .* got \d+ in", said
        )


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_of_one_process_alone_is_refused(verb: str, tmp_path: Path) -> None:
    found = outcomes(2, begin_alone, verb, tmp_path / "kept", store=tmp_path / "store")
    for succeeded, said in found:
        assert not succeeded
        rule = rf"StageFailed: {verb}: checkpoint.* got 0 in process 0 and None in process 1"
        assert re.search(rule, said)


@pytest.mark.parametrize("after", [2, None], ids=["to-stop", "on-the-way"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_the_first_process_cannot_write_ends_the_others(
    verb: str, after: int | None, tmp_path: Path
) -> None:
    (one, first), (other, second) = outcomes(
        2, fail_to_write, verb, tmp_path / "kept", after, store=tmp_path / "store"
    )
    assert not one and not other
    assert "no space" in first
    assert f"StageFailed: {verb}: every process must succeed, got a failure in process 0" in second
