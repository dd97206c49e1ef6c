"""The counters of a training."""

from __future__ import annotations

from vitprune_fast.distill.progress import Progress


def test_an_epoch_is_the_mean_of_the_steps_that_were_taken() -> None:
    progress = Progress(step=3)
    progress.add({"loss": 2.0, "ce": 1.0})
    progress.skip()
    progress.add({"loss": 4.0, "ce": 2.0})
    assert progress.skipped_in_a_row == 0
    entry = progress.end_epoch(1, 0.5)
    assert entry == {
        "epoch": 1,
        "step": 3,
        "lr": 0.5,
        "loss": 3.0,
        "ce": 1.5,
        "kd": None,
        "skipped": 1,
    }
    progress.skip()
    progress.skip()
    assert (progress.skipped, progress.skipped_in_a_row) == (3, 2)
    entry = progress.end_epoch(2, 0.5)
    assert entry["loss"] is None and entry["skipped"] == 2


def test_the_best_epoch_is_the_earliest_of_equals() -> None:
    progress = Progress()
    assert [progress.note_best(e, v) for e, v in enumerate((0.5, 0.5, 0.7, 0.6))] == [
        True,
        False,
        True,
        False,
    ]
    assert (progress.best_epoch, progress.best_top1) == (2, 0.7)
    progress.forget_best()
    assert progress.note_best(4, 0.1) and progress.best_epoch == 4


def test_a_later_epoch_may_lack_the_noise() -> None:
    progress = Progress()
    seen = (0.5, 0.46, 0.44, 0.7, 0.64, 0.66)
    kept = [progress.note_best(epoch, top1, 0.05) for epoch, top1 in enumerate(seen)]
    assert kept == [True, True, False, True, False, True]
    assert (progress.best_epoch, progress.best_top1) == (3, 0.7)
