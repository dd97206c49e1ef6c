"""The dense model: opened with its weights, or trained here."""

from __future__ import annotations

from vitprune_fast import planning
from vitprune_fast.run.inputs import check_fit, open_weights, remember_normalisation
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def dense(job: Job, *, model: str) -> Facts:
    """Saves the model that the run begins with."""
    config = job.config
    classes = None if config.has_weights else len(job.data.classes)
    opened = open_weights(config.model, config.seed, classes)
    source = str(config.model.checkpoint or config.model.name)
    facts: Facts = {"source": source, "text": f"weights from {source}"}
    if not config.has_weights:
        facts = job.training_facts(job.train(opened, None, config.dense))
    check_fit(opened, job.data)
    remember_normalisation(opened, job.data, trained=not config.has_weights)
    cost = planning.cost(opened)
    return {
        **facts,
        "cost": {"params": cost.params, "macs": cost.macs},
        "checks": job.keep(opened, model),
    }
