"""What an allocation solves: ladders of kept counts, what units are worth, and what counts cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import neg

import numpy as np

from ..structure import Axis, Group, Structure
from ..structure.reading import Reading


@dataclass(frozen=True)
class Ladder:
    """Allowed kept-counts (descending) and removal order of axes that keep the same units.

    Of dims of heads every head keeps equally many, its own best ones, since raggedness saves
    nothing: what goes at once is one of each head.

    Attributes:
        group: the axes.
        order: unit numbers, least important first; a row per parent unit, or a single one.
        scores: of what goes at once, in this order: the sum over the rows.
        rungs: allowed numbers of units that every row keeps, down to the minimum.
        held: for branches and blocks, which branches each unit consists of; else empty.
    """

    group: Group
    order: np.ndarray
    scores: np.ndarray
    rungs: tuple[int, ...]
    held: Sequence[tuple[str, ...]] = ()

    @property
    def axis(self) -> Axis:
        """The representative of the group."""
        return self.group.first

    @property
    def width(self) -> int:
        """How many units a row has."""
        return self.order.shape[1]

    @property
    def breadth(self) -> int:
        """How many units go at once, in all axes of the group."""
        return len(self.order) * len(self.group.axes)

    def keep(self, count: int) -> list[int]:
        """The ``count`` best units of every row, sorted by number."""
        return sorted(self.order[:, self.width - count :].ravel().tolist())

    def removed(self, count: int) -> set[str]:
        """The branches that go where ``count`` units stay, of an axis of branches or blocks."""
        gone = self.order[0, : self.width - count].tolist() if self.held else ()
        return {branch for unit in gone for branch in self.held[unit]}

    def at_share(self, share: float) -> int:
        """The allowed count nearest to a share of the axis, the larger one on a tie."""
        wanted = share * self.width
        # the rungs fall, so that only those around the first one below may be nearest
        below = bisect_left(self.rungs, -wanted, key=neg)
        near = self.rungs[max(below - 1, 0) : below + 1]
        return min(near, key=lambda n: (abs(n - wanted), -n))


def ordered(ranking: np.ndarray, rows: int = 1) -> np.ndarray:
    """(rows, units of each) unit numbers, the least important of every row first.

    Among equals the highest number goes first, so the lowest ones stay.
    """
    each = ranking.reshape(rows, -1)
    order = each.shape[1] - 1 - np.argsort(each[:, ::-1], axis=1, kind="stable")
    return order + np.arange(rows)[:, None] * each.shape[1]


@dataclass(frozen=True)
class Problem:
    """How many units each axis keeps is to be found.

    Attributes:
        structure: of the model.
        ladders: of every group of axes, in model order.
        values: name of a ladder's axis -> (width,), what goes at once is worth, in removal order,
            made comparable between axes.
        limits: ``"macs"`` and ``"params"``, or one of them -> the largest number allowed.
        keep: unit kind -> share of its units to keep; limits and shares are not given together.
    """

    structure: Structure
    ladders: Sequence[Ladder]
    values: Mapping[str, np.ndarray]
    limits: Mapping[str, int]
    keep: Mapping[str, float] | None = None

    def costs(self, counts: Sequence[int]) -> dict[str, int]:
        """What counts cost, one for each ladder, in every measure that is limited.

        Which units an axis keeps does not change it, except for branches and blocks, and where
        their number reaches zero.
        """
        kept: dict[str, int] = {}
        removed: set[str] = set()
        for ladder, count in zip(self.ladders, counts, strict=True):
            if ladder.held:
                removed |= ladder.removed(count)
            else:
                kept |= dict.fromkeys(ladder.group.names, count)
        reading = Reading.of_counts(self.structure, kept, removed)
        return {measure: getattr(reading, measure) for measure in self.limits}

    def load(self, counts: Sequence[int]) -> float:
        """What counts cost as a share of what is allowed, in the measure that is nearest to it."""
        return max(cost / self.limits[name] for name, cost in self.costs(counts).items())

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether counts are within all limits."""
        return all(cost <= self.limits[name] for name, cost in self.costs(counts).items())

    @cached_property
    def smallest(self) -> list[int]:
        """The lowest rung of every ladder."""
        return [ladder.rungs[-1] for ladder in self.ladders]
