"""A teacher that may have to learn the classes of the data first."""

from __future__ import annotations

from typing import Any

from vitprune_fast.run import training
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def teacher(job: Job, *, dense: str, weights: str) -> Facts:
    """Trains the teacher of timm that the step is numbered after (`teacher-0`), where it must.

    Its weights are left in a file, which is empty for one that teaches as it is.
    """
    number = int(job.step.name.rpartition("-")[2])
    name = job.config.teachers.names[number]
    facts: Facts = {"text": f"{name} teaches as it is"}
    tensors: dict[str, Any] = {}

    def train(resized: Any, config: Any) -> None:
        result = job.train(resized, None, config)
        tensors.update({n: t.cpu().contiguous() for n, t in resized.model.state_dict().items()})
        facts.update(job.training_facts(result))
        facts["text"] = f"{name}, {facts['text']}"

    training.open_teacher(
        number,
        job.config.teachers,
        job.config.distill,
        job.load(dense),
        job.data,
        job.setting,
        train=train,
    )
    job.write(weights, tensors)
    return facts
