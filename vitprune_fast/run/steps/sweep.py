"""Refits what stays to what the model computed before the cut."""

from __future__ import annotations

from vitprune_fast import gates, planning
from vitprune_fast.run import actions, checks
from vitprune_fast.run.job import Job
from vitprune_fast.run.refit import left_out_lines, refit_text
from vitprune_fast.run.step import Facts
from vitprune_fast.structure import describe


def sweep(
    job: Job, *, model: str, plan: str, swept: str, fits: str, behind: str | None = None
) -> Facts:
    """Cuts a plan out of a model and refits what stays on training images.

    Args:
        job: the run.
        model: that is cut.
        plan: that is cut out of it.
        swept: what is made.
        fits: what was refitted.
        behind: a plan that the model was taught behind. Its heads, dims and neurons that were left
            out then were not taught, so that they are silent in what stays is refitted to.
    """
    loaded, chosen = job.load(model), planning.Plan.load(job.folder / plan)
    if behind is not None:
        gates.silence(loaded, planning.Plan.load(job.folder / behind))
    predicted = planning.predict_cost(describe(loaded), chosen)
    result, report = job.resumable(
        "the sweep",
        "sweep.safetensors",
        actions.sweep,
        loaded,
        chosen,
        job.data,
        job.config.sweep,
        job.setting,
    )
    job.write(fits, report.to_dict())
    for text in (*report.warnings, *left_out_lines(report)):
        job.note(text)
    cost = planning.cost(result)
    same_cost = checks.Check(
        "refitting changes no cost",
        (cost.params, cost.macs) == (predicted.params, predicted.macs),
        f"{cost.macs:,} MACs and {cost.params:,} params",
    )
    job.proofs.append(same_cost)
    return {
        "images": report.images,
        "fits": fits,
        "checks": job.keep(result, swept),
        "text": refit_text(report),
    }
