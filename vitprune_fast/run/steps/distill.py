"""Teaches the smaller model."""

from __future__ import annotations

from vitprune_fast.run.inputs import remember_normalisation
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def distill(job: Job, *, student: str, dense: str, model: str, **teachers: str) -> Facts:
    """Trains a pruned model towards the dense one, or towards the teachers that are named."""
    taught = job.load(student)
    result = job.train(taught, job.teachers(taught, dense, teachers), job.config.distill)
    remember_normalisation(taught, job.data, trained=True)
    return {**job.training_facts(result, teachers=True), "checks": job.keep(taught, model)}
