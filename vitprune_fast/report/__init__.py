"""The report of a run: one self-contained page for a person who did not run it."""

from vitprune_fast.report.page import write_report

__all__ = ["write_report"]
