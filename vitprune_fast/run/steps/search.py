"""How many units of each kind may go, by evaluation on validation images."""

from __future__ import annotations

from vitprune_fast.run import actions, checks
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.run.steps.plan import plan_facts
from vitprune_fast.scoring import Scores
from vitprune_fast.search import SearchResult
from vitprune_fast.structure import describe


def search(job: Job, *, model: str, scores: str, plan: str, search: str) -> Facts:
    """Plans the cut of a model with the ratios that are found, and keeps all candidates."""
    config, loaded = job.config, job.load(model)
    found: SearchResult = job.resumable(
        "the search",
        "candidates.safetensors",
        actions.search,
        loaded,
        Scores.load(job.folder / scores),
        job.data,
        config.scoring,
        config.search,
        config.plan,
        job.setting,
        units=config.plan.units,
    )
    job.write(plan, found.plan)
    job.write(search, found.to_json())
    structure, before, after = describe(loaded), found.baseline, found.chosen
    lost, tolerance = before.top1 - after.top1, config.search.tolerance
    within = checks.Check(
        "the cut loses no more than the tolerance on validation images",
        lost <= tolerance + 1e-12,
        f"{lost:.4f} of {tolerance:g}",
    )
    gone = ", ".join(f"{ratio:.1%} ({kind})" for kind, ratio in found.ratios.items())
    cut = [axis.name for kind in config.plan.units for axis in structure.units(kind)]
    return {
        **plan_facts(structure, found.plan, cut),
        "budget": {"macs": after.macs / before.macs},
        "plan": plan,
        "search": search,
        "ratios": found.ratios,
        "candidates": len(found.table),
        "undone": {"refused": found.refused, "final check": found.taken_back},
        "checks": checks.require(job.step.name, [] if config.search.by_cost else [within]),
        "text": f"without {gone}, {after.macs / before.macs:.1%} of the MACs; {len(found.table)} "
        f"evaluations, {found.refused} cuts refused, {found.taken_back} taken back in the end",
    }
