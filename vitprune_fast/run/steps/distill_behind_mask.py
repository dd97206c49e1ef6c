"""Teaches what a plan keeps of a model, and leaves all of its weights."""

from __future__ import annotations

from vitprune_fast import planning
from vitprune_fast.distill.masks import MaskSchedule
from vitprune_fast.run.inputs import remember_normalisation
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.structure import describe


def distill_behind_mask(
    job: Job, *, student: str, plan: str, dense: str, model: str, **teachers: str
) -> Facts:
    """Trains the units that a plan keeps; the others stay in the model, so that they can return."""
    loaded, chosen = job.load(student), planning.Plan.load(job.folder / plan)
    structure = describe(loaded)
    share = planning.predict_cost(structure, chosen).macs / planning.predict_cost(structure).macs
    schedule = MaskSchedule(share, "one_shot", end=0.0, planner=lambda *_: chosen)
    result = job.train(
        loaded, job.teachers(loaded, dense, teachers), job.config.distill, masks=schedule
    )
    remember_normalisation(loaded, job.data, trained=True)
    return {**job.training_facts(result, teachers=True), "checks": job.keep(loaded, model)}
