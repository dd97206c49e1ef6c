"""Learns with gates which units may go."""

from __future__ import annotations

from vitprune_fast.run import checks, training
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.run.steps.plan import keep_planned


def learn_gates(job: Job, *, dense: str, model: str, plan: str, **teachers: str) -> Facts:
    """Trains gates together with the weights; leaves the model with folded gates, and the plan."""
    config, student = job.config, job.load(dense)
    gated = training.learn_gates(
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
    if config.gates.settles:
        job.proofs.append(checks.reached(gated.start, gated.end, gated.goal))
    macs = {"start": gated.start, "end": gated.end, "goal": gated.goal}
    if gated.end < 0.8 * gated.goal:
        job.note(
            f"gates left {gated.end:.1%} of the MACs where {gated.goal:.1%} were asked for: what "
            "the cut keeps besides starts from nothing; --gate-epochs gives them more time"
        )
    kept = keep_planned(job, gated.result, config.gates.units, model=model, plan=plan)
    text = f"{kept['text']}, {gated.end:.1%} of the MACs under the gates"
    return {**kept, "gate_macs": macs, "text": text}
