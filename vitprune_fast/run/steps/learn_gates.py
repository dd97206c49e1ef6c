"""Learns with gates what may go."""

from __future__ import annotations

from vitprune_fast.run import training
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.run.steps.plan import plan_facts
from vitprune_fast.structure import describe


def learn_gates(job: Job, *, dense: str, model: str, plan: str, **teachers: str) -> Facts:
    """Trains gates beside the weights; leaves the model with its gates folded in, and the plan."""
    config, student = job.config, job.load(dense)
    done = training.learn_gates(
        student,
        job.teachers(student, dense, teachers),
        config.distill,
        job.train,
        config.gates,
        data=job.data,
        setting=job.setting,
        score=config.score,
        cut=config.plan,
    )
    job.write(plan, done.plan)
    trained = job.training_facts(done.result, teachers=True)
    left = plan_facts(describe(student), done.plan, done.axes)
    return {
        **trained,
        "budget": config.budget(),
        "plan": plan,
        **left,
        "text": f"{trained['text']}, {left['text']}",
        "checks": job.keep(student, model),
    }
