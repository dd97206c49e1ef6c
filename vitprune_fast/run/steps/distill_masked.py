"""Prunes while training: masks that grow, steps that run on what is live."""

from __future__ import annotations

from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.run.steps.plan import keep_planned
from vitprune_fast.run.training import mask_schedule


def distill_masked(job: Job, *, dense: str, model: str, plan: str, **teachers: str) -> Facts:
    """Trains the dense model while units go; leaves all of its weights, and what is live."""
    config, student = job.config, job.load(dense)
    schedule = mask_schedule(config.masks)
    assert schedule is not None
    result = job.train(
        student, job.teachers(student, dense, teachers), config.distill, masks=schedule
    )
    return keep_planned(job, result, schedule.units, model=model, plan=plan)
