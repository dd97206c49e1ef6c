"""What the model can do without."""

from __future__ import annotations

from vitprune_fast.run import actions
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.scoring import Scores
from vitprune_fast.scoring.agreement import agreement_text


def score(job: Job, *, model: str, scores: str) -> Facts:
    """Scores the units of a model on training images."""
    found: Scores = job.resumable(
        "scoring",
        "sums.safetensors",
        actions.score,
        job.load(model),
        job.data,
        job.config.scoring,
        job.setting,
    )
    job.write(scores, found)
    units = sum(len(values) for values in found.values())
    compared = agreement_text(found.provenance)
    words = (f"{units:,} units", f"{found.samples:,} images", compared)
    return {
        "units": units,
        "samples": found.samples,
        "skipped": found.skipped,
        "rank_agreement": found.provenance.get("rank_agreement"),
        "text": ", ".join(text for text in words if text),
    }
