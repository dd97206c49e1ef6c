"""The dense model: opened with its weights, or trained here."""

from __future__ import annotations

from vitprune_fast import planning
from vitprune_fast.run.inputs import (
    check_fit,
    open_weights,
    remember_normalisation,
    trains_dense,
)
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def dense(job: Job, *, model: str) -> Facts:
    """Saves the model that the run begins with."""
    config = job.config
    trains = trains_dense(config, job.data)
    classes = len(job.data.classes) if trains else None
    opened = open_weights(config.model, config.seed, classes)
    source = str(config.model.checkpoint or config.model.name)
    facts: Facts = {"text": f"weights from {source}"}
    if config.has_weights:
        facts["source"] = source
    if trains:
        facts |= job.training_facts(job.train(opened, None, config.dense))
    check_fit(opened, job.data)
    remember_normalisation(opened, job.data, trained=trains)
    cost = planning.cost(opened)
    return {
        **facts,
        "cost": {"params": cost.params, "macs": cost.macs},
        "checks": job.keep(opened, model),
    }
