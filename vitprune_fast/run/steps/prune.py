"""Removes what does not stay."""

from __future__ import annotations

from dataclasses import replace

from vitprune_fast import planning
from vitprune_fast.run import actions, checks
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def prune(job: Job, *, model: str, plan: str, pruned: str, dense: str | None = None) -> Facts:
    """Cuts a plan out of a model; shares of the budget are those of ``dense`` where it is given."""
    loaded = job.load(model)
    result, proofs = checks.prune_and_prove(
        loaded, planning.Plan.load(job.folder / plan), job.images
    )
    counted = planning.cost(result)
    whole = planning.cost(loaded if dense is None else job.load(dense))
    asked = replace(job.config.plan, **job.config.budget())
    limits = actions.limits(asked, whole)
    proofs += checks.within_budget(counted, limits)
    return {
        "cost": {"params": counted.params, "macs": counted.macs},
        "checks": job.keep(result, pruned, proofs),
        "text": f"{counted.macs:,} MACs, {counted.params:,} params",
    }
