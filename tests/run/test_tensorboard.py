"""TensorBoard sees each point once, with the values of the metrics file."""

from __future__ import annotations

import importlib.util
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.attempts import Attempts, Fault, Outcome
from tests.run.conftest import TINY, command
from tests.run.same import assert_same_run
from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import BackendUnavailable
from vitprune_fast.recipes.start import run
from vitprune_fast.run.folder import read_metrics
from vitprune_fast.run.tensorboard import Board

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def points(folder: Path, stage: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of one curve, as TensorBoard reads it from all event files of a stage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def assert_curves_are_the_metrics(folder: Path) -> None:
    lines = read_metrics(folder / "metrics.jsonl")
    for stage in ("dense", "distill"):
        for name in ("loss", "val_top1"):
            wanted = [(e["step"], e[name]) for e in lines if e["stage"] == stage and name in e]
            assert wanted
            found = points(folder, stage, name)
            assert [step for step, _ in found] == [step for step, _ in wanted]
            assert [v for _, v in found] == pytest.approx([v for _, v in wanted], rel=1e-6)


@needs_tensorboard
def test_a_killed_run_has_no_point_twice(
    attempts: Attempts, short: tuple[Path, Outcome], tmp_path: Path
) -> None:
    words = [*command(TINY, tmp_path / "run"), "--tensorboard"]
    for stage in ("dense", "distill"):
        # the first epoch is told and written, and then without its checkpoint, or with it
        for fault in (Fault(1, "before", kinds=("create",)), Fault(1, "after", kinds=("rename",))):
            outcome = attempts.finish(words, fault=replace(fault, after_step_of=stage))
            assert outcome.status == -signal.SIGKILL
            assert [e[1] for e in outcome.events if e[0] == "epoch"][-1] == stage
    outcome = attempts.finish(words)
    assert outcome.status == 0, outcome.err
    assert_curves_are_the_metrics(tmp_path / "run")
    # asked for or not, the results are the same
    (tmp_path / "run" / "tensorboard").rename(tmp_path / "tensorboard")
    assert_same_run(short[0], tmp_path / "run")


@needs_tensorboard
def test_it_may_be_asked_for_later(copied: RunConfig) -> None:
    run(replace(copied, tensorboard=True))
    assert_curves_are_the_metrics(copied.out)


def test_without_the_package_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendUnavailable, match=r"install vitprune_fast\[tensorboard\]"):
        Board(tmp_path)
    with pytest.raises(BackendUnavailable, match="needs tensorboard"):
        run(replace(TINY, out=tmp_path / "run", tensorboard=True))
    # refused before any work
    assert not (tmp_path / "run").exists()
