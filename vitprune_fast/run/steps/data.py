"""Looks at every image once, and sets those aside that cannot be read."""

from __future__ import annotations

from dataclasses import asdict

from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def data(job: Job, *, set_aside: str) -> Facts:
    """Writes the list of unreadable images."""
    bad = job.source.find_bad_images(workers=job.profile.workers)
    job.write(set_aside, {"images": [asdict(image) for image in bad]})
    sizes = {name: len(job.data.split(name)) for name in job.data.split_hashes}
    counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    aside = f"; {len(bad):,} unreadable image{'s' * (len(bad) > 1)} set aside" if bad else ""
    return {
        "split_sizes": sizes,
        "text": f"{counts}, {len(job.data.classes)} classes{aside}",
    }
