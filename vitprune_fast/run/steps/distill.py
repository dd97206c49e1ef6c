"""Teaches the smaller model."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from vitprune_fast import planning
from vitprune_fast.run.inputs import remember_normalisation
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.structure import describe


def distill(
    job: Job, *, student: str, dense: str, model: str, cut: str | None = None, **teachers: str
) -> Facts:
    """Trains a student towards a larger model, or towards the teachers that are named.

    Args:
        job: the run.
        student: what is trained.
        dense: the larger model, which is `self` among the teachers.
        model: what is made.
        cut: the plan that made the student of ``dense``. If that took whole blocks, a block that
            stayed is compared with the last one before the next that stayed, so that it learns to
            do the work of those between them; unless the settings name pairs.
        teachers: `teacher_0` and so on -> weights.
    """
    taught, config = job.load(student), job.config.distill
    if cut is not None and not config.layers:
        config = replace(config, layers=_spans(job, dense, cut))
    result = job.train(taught, job.teachers(taught, dense, teachers), config)
    remember_normalisation(taught, job.data, trained=True)
    return {
        **job.training_facts(result, teachers=True, dense=dense),
        "layers": [list(pair) for pair in config.layers],
        "checks": job.keep(taught, model),
    }


def _spans(job: Job, dense: str, cut: str) -> tuple[tuple[int, int], ...]:
    """Pairs of (block that stayed, block of the larger model); none where all blocks stayed."""
    plan = planning.Plan.load(job.folder / cut)
    axes = describe(job.load(dense)).units("block")
    # blocks are counted through the stages
    starts = accumulate((axis.size for axis in axes), initial=0)
    kept = [
        start + block
        for start, axis in zip(starts, axes, strict=False)
        for block in plan[axis.name]
    ]
    total = sum(axis.size for axis in axes)
    if len(kept) == total:
        return ()
    ends = [*(after - 1 for after in kept[1:]), total - 1]
    return tuple(enumerate(ends))
