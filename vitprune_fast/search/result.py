"""What a search found, and all that it tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..planning.plan import Plan
from .candidate import Candidate


@dataclass(frozen=True)
class SearchResult:
    """The plan that was chosen, and every candidate.

    Attributes:
        mode: ``iterative``, ``grid`` or ``equal-macs``.
        chosen: measured on all validation images.
        baseline: the unpruned model, measured on all validation images.
        table: all candidates in the order in which they were evaluated.
    """

    mode: str
    chosen: Candidate
    baseline: Candidate
    table: tuple[Candidate, ...]

    @property
    def plan(self) -> Plan:
        """Of the candidate that was chosen."""
        return self.chosen.plan

    @property
    def ratios(self) -> dict[str, float]:
        """Unit kind -> share of its units that go."""
        return dict(self.chosen.ratios)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.chosen.macs

    @property
    def top1(self) -> float:
        """Share of right answers on all validation images."""
        return self.chosen.top1

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns of :attr:`rows`."""
        return ("candidate", *self.chosen.ratios, "MACs", "top-1", "images", "feasible")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A line of text for every candidate, and what was chosen at the end."""
        chosen = replace(self.chosen, step="chosen")
        return [self._row(candidate) for candidate in (*self.table, chosen)]

    def _row(self, candidate: Candidate) -> tuple[str, ...]:
        return (
            candidate.step,
            *(f"{ratio:.1%}" for ratio in candidate.ratios.values()),
            f"{candidate.macs / self.baseline.macs:.1%}",
            f"{candidate.top1:.2%}",
            f"{candidate.images:,}",
            "yes" if candidate.feasible else "no",
        )

    def __str__(self) -> str:
        lines = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: all but the plan, which has a file of its own."""
        return {
            "mode": self.mode,
            "baseline": self.baseline.to_json(),
            "chosen": self.chosen.to_json(),
            "table": [each.to_json() for each in self.table],
        }
