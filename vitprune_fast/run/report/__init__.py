"""The report of a run, and of several: one self-contained page for a person who did not run it."""

from vitprune_fast.run.report.compare import write_comparison
from vitprune_fast.run.report.page import write_report

__all__ = ["write_comparison", "write_report"]
