"""The page for a person who did not run it."""

from __future__ import annotations

from vitprune_fast.errors import StageFailed
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts


def report(job: Job, *, summary: str, page: str) -> Facts:
    """Draws the report of what was done so far."""
    try:
        from vitprune_fast.run.report import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise StageFailed(
            f"run: the report needs {error.name}; install vitprune_fast[report] and run the same "
            "command again"
        ) from None
    return {"text": str(write_report(job.folder.path))}
