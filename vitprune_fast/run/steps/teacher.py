"""A teacher that does not know the classes of the data yet."""

from __future__ import annotations

from vitprune_fast.run import training
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def teacher(job: Job, *, weights: str) -> Facts:
    """Trains the teacher of timm that the step is named after (`teacher-0`), where it must learn.

    Its weights are left in a file, which is empty for one that teaches as it is.
    """
    config = job.config
    number = int(job.step.name.rpartition("-")[2])
    name = config.teachers.names[number]
    facts: Facts = {"text": f"{name} teaches as it is"}
    tensors = {}
    if training.is_trained_here(name, config.teachers, job.data):
        model, result = training.train_teacher(
            number, config.teachers, config.distill, job.train, job.data, config.seed
        )
        tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
        facts = job.training_facts(result)
        facts["text"] = f"{name}, {facts['text']}"
    job.write(weights, tensors)
    return facts
