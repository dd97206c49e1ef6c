"""What a search found, and all that it tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..planning.plan import Plan
from .candidate import Candidate

CHECK = "check on all images"
"""What candidates are tried for that passed on a part of the images."""


@dataclass(frozen=True)
class SearchResult:
    """The plan that was chosen, and every candidate.

    Attributes:
        mode: ``iterative``, ``grid``, ``equal-macs`` or ``fixed``.
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
    def refused(self) -> int:
        """How many cuts lost too much where they were tried."""
        return sum(not each.feasible for each in self.table if each.step != CHECK)

    @property
    def taken_back(self) -> int:
        """How many cuts passed on a part of the images, and then did not on all of them."""
        return sum(not each.feasible for each in self.table if each.step == CHECK)

    def __str__(self) -> str:
        lines = table_of(self.to_json())
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: all but the plan, which has a file of its own."""
        return {
            "format": "vitprune_fast.search",
            "mode": self.mode,
            "baseline": self.baseline.to_json(),
            "chosen": self.chosen.to_json(),
            "table": [each.to_json() for each in self.table],
        }


def table_of(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Headings, a line for every candidate, and what was chosen at the end.

    Args:
        found: a result as ``SearchResult.to_json`` gives it.
    """
    chosen = {**found["chosen"], "step": "chosen"}
    return [
        ("candidate", *chosen["ratios"], "MACs", "top-1", "images", "feasible"),
        *(
            (
                each["step"],
                *(f"{ratio:.1%}" for ratio in each["ratios"].values()),
                f"{each['macs'] / found['baseline']['macs']:.1%}",
                f"{each['top1']:.2%}",
                f"{each['images']:,}",
                "yes" if each["feasible"] else "no",
            )
            for each in (*found["table"], chosen)
        ),
    ]
