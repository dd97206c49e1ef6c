"""Which images there are."""

from __future__ import annotations

from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def data(job: Job) -> Facts:
    """Counts the images of the splits; none is read before it is needed."""
    sizes = {name: len(job.data.split(name)) for name in job.data.split_hashes}
    counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    return {"split_sizes": sizes, "text": f"{counts}, {len(job.data.classes)} classes"}
