"""Which units stay."""

from __future__ import annotations

from collections.abc import Collection

from vitprune_fast import planning
from vitprune_fast.distill.loop import DistillResult
from vitprune_fast.run import actions
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.scoring import Scores
from vitprune_fast.structure import Structure, describe


def plan(job: Job, *, model: str, scores: str, plan: str, dense: str | None = None) -> Facts:
    """Plans the cut of a model; shares of a budget are those of ``dense`` where it is given."""
    loaded, found = job.load(model), Scores.load(job.folder / scores)
    reference = None if dense is None else planning.cost(job.load(dense))
    chosen = actions.plan(loaded, found, job.config.plan, dense=reference)
    job.write(plan, chosen)
    facts = plan_facts(describe(loaded), chosen, found)
    return {"budget": job.config.plan.budget(), "plan": plan, "scores": scores, **facts}


def keep_planned(
    job: Job, result: DistillResult, kinds: Collection[str], *, model: str, plan: str
) -> Facts:
    """Keeps a model that was trained while units of these kinds were chosen, and the plan."""
    assert result.plan is not None
    job.write(plan, result.plan)
    structure = describe(result.model)
    cut = [axis.name for kind in kinds for axis in structure.units(kind)]
    trained = job.training_facts(result, teachers=True)
    left = plan_facts(structure, result.plan, cut)
    return {
        **trained,
        "budget": job.config.budget(),
        "plan": plan,
        **left,
        "text": f"{trained['text']}, {left['text']}",
        "checks": job.keep(result.model, model),
    }


def plan_facts(structure: Structure, plan: planning.Plan, cut: Collection[str]) -> Facts:
    """What a plan leaves of the axes it was made about."""
    predicted = planning.predict_cost(structure, plan)
    axes = {
        name: {"kind": axis.kind, "size": axis.size, "kept": len(plan[name])}
        for name, axis in structure.axes.items()
        if name in cut
    }
    kept = sum(axis["kept"] for axis in axes.values())
    total = sum(axis["size"] for axis in axes.values())
    return {
        "axes": axes,
        "predicted": {"params": predicted.params, "macs": predicted.macs},
        "text": f"{kept:,} of {total:,} units kept",
    }
