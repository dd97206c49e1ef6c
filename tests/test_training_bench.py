"""The benches of training steps run at tiny sizes, and time what users call."""

from __future__ import annotations

from typing import Any

import pytest

from bench import bench_distill_step as bench
from bench.bench_masked_step import DENSE, OURS, PEER, masked_step
from vitprune_fast.distill import distill


def test_the_bench_of_a_step_times_distill_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def noted(student: Any, teacher: Any, train: Any, *others: Any, **more: Any) -> Any:
        trained.append(len(train))
        return distill(student, teacher, train, *others, **more)

    monkeypatch.setattr(bench, "distill", noted)
    entries = bench.distill_step("test_vit", 2, "cpu", rounds=1, warm=1, steps=2)
    assert [e.name for e in entries] == [bench.SOFT, bench.OURS, bench.EAGER, bench.MASKED]
    assert entries[0].times_ours == 1 and "multiply-accumulates" in entries[0].note
    for entry in entries:
        assert entry.seconds > 0 and entry.images_per_s == pytest.approx(2 / entry.seconds)
    # both forms: one batch for the losses, a training unheard, and one in the round
    assert sorted(trained) == [1, 1, 3, 3, 3, 3]


def test_loops_with_other_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Written, "__call__", lambda *_: 1.0)
    monkeypatch.setattr(bench, "seconds_per_step", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="soft-compacted"):
        bench.distill_step("test_vit", 2, "cpu", rounds=1)


def test_the_bench_of_masks_runs_at_any_size() -> None:
    entries = masked_step("test_vit", 2, "cpu", rounds=1)
    assert [e.name for e in entries] == [OURS, PEER, DENSE]
    assert all(entry.seconds > 0 for entry in entries)
