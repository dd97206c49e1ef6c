"""The dense model: opened with its weights, or trained here."""

from __future__ import annotations

import math
from typing import Any

from vitprune_fast import planning
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run import actions
from vitprune_fast.run.inputs import (
    check_fit,
    open_weights,
    remember_normalisation,
    trains_dense,
)
from vitprune_fast.run.job import Job
from vitprune_fast.run.published import published
from vitprune_fast.run.step import Facts


def dense(job: Job, *, model: str) -> Facts:
    """Saves the model that the run begins with; one that knows the data is measured first."""
    config = job.config
    trains = trains_dense(config, job.data)
    classes = len(job.data.classes) if trains else None
    opened = open_weights(config.model, config.seed, classes)
    source = str(config.model.checkpoint or config.model.name)
    facts: Facts = {"text": f"weights from {source}"}
    if config.has_weights:
        facts["source"] = source
    check_fit(opened, job.data)
    if trains:
        result = job.train(opened, None, config.dense)
        last = result.history[-1]["val_top1"] if result.history else None
        # the line that later trainings are drawn beside
        facts["validation_top1"] = result.best_top1 if config.dense.chooses else last
        facts |= job.training_facts(result)
    else:
        facts |= _measured(job, opened, facts["text"])
    remember_normalisation(opened, job.data, trained=trains)
    cost = planning.cost(opened)
    return {
        **facts,
        "cost": {"params": cost.params, "macs": cost.macs},
        "checks": job.keep(opened, model),
    }


def _measured(job: Job, model: Any, text: str) -> Facts:
    """How often the model is right on validation images, beside what is published of it.

    Raises:
        InvalidInput: it is no better than chance, and the run was not told to go on.
    """
    (found,) = actions.evaluate([model], job.data, job.setting, split="validation")
    shown = f"{found.top1:.2%} ({found.top1_count:,} of {found.samples:,})"
    labels = job.data.split("validation").labels
    likely = int(labels.bincount().max()) / len(labels)
    mean = likely * found.samples
    # what the most frequent class alone would give, and three standard deviations
    chance = mean + 3 * math.sqrt(mean * (1 - likely))
    # few images do not tell a fair model from chance
    if found.top1_count <= chance < found.samples / 2 and not job.config.allow_chance:
        raise InvalidInput(
            f"run: {job.config.model.checkpoint or job.config.model.name} must know the classes of "
            f"{job.data.name}, got {shown} right of the validation images, no more than chance; "
            "check the order of the classes, --mean and --std and the checkpoint, or go on with "
            "--allow-chance"
        )
    known = published(job.config.model, job.skeleton, job.data)
    beside = f" (published, of the test split: {known.top1:.2%})" if known else ""
    return {
        "text": f"{text}, validation top-1 {shown}{beside}",
        "validation_top1": found.top1,
    }
