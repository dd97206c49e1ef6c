"""A fresh student: another architecture with random weights, instead of a cut of the dense model.

As in fine-grained manifold distillation (Hao et al. 2022, arXiv:2107.01378), where CaiT-S24 teaches
DeiT-Tiny.
"""

from __future__ import annotations

from vitprune_fast import planning
from vitprune_fast.run import checks
from vitprune_fast.run.inputs import open_weights, remember_normalisation, student_config
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def student(job: Job, *, dense: str, model: str) -> Facts:
    """Saves the student that the configuration names; it must cost less than the dense model."""
    config = job.config
    opened = open_weights(
        student_config(config.student, job.data), config.seed, purpose="student init"
    )
    remember_normalisation(opened, job.data, trained=False)
    proofs = [checks.finite(opened, job.images), checks.fewer_macs(opened, job.load(dense))]
    cost = planning.cost(opened)
    return {
        "cost": {"params": cost.params, "macs": cost.macs},
        "checks": job.keep(opened, model, proofs),
        "text": f"{config.student.name}, {cost.macs:,} MACs, {cost.params:,} params",
    }
