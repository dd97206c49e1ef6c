"""Prunes while training: masks that grow, steps that run on what is live."""

from __future__ import annotations

from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.run.steps.plan import plan_facts
from vitprune_fast.run.training import mask_schedule
from vitprune_fast.structure import describe


def distill_masked(job: Job, *, dense: str, model: str, plan: str, **teachers: str) -> Facts:
    """Trains the dense model while units go; leaves all of its weights, and what is live."""
    config, student = job.config, job.load(dense)
    schedule = mask_schedule(config.masks)
    result = job.train(
        student, job.teachers(student, dense, teachers), config.distill, masks=schedule
    )
    assert schedule is not None and result.plan is not None
    job.write(plan, result.plan)
    structure = describe(student)
    cut = [axis.name for kind in schedule.units for axis in structure.units(kind)]
    trained = job.training_facts(result, teachers=True)
    left = plan_facts(structure, result.plan, cut)
    return {
        **trained,
        "budget": config.budget(),
        "plan": plan,
        **left,
        "text": f"{trained['text']}, {left['text']}",
        "checks": job.keep(student, model),
    }
