"""What an allocation solves: ladders of kept counts, what units are worth, and what counts cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import neg

import numpy as np

from ..errors import InfeasibleBudget
from ..structure import Axis, Group, Structure
from ..structure.reading import Reading
from .budget import Budget
from .cost import predict_cost


@dataclass(frozen=True)
class Ladder:
    """Allowed kept-counts (descending) and removal order of axes that keep the same units."""

    group: Group
    # unit numbers, least important first
    order: np.ndarray
    # allowed numbers of kept units, from all of them down to the minimum
    rungs: tuple[int, ...]

    @property
    def axis(self) -> Axis:
        """The representative of the group."""
        return self.group.first

    def keep(self, count: int) -> list[int]:
        """The ``count`` best units, sorted by number."""
        return sorted(self.order[len(self.order) - count :].tolist())

    def at_share(self, share: float) -> int:
        """The allowed count nearest to a share of the axis, the larger one on a tie."""
        wanted = share * self.axis.size
        # the rungs fall, so that only those around the first one below may be nearest
        below = bisect_left(self.rungs, -wanted, key=neg)
        near = self.rungs[max(below - 1, 0) : below + 1]
        return min(near, key=lambda n: (abs(n - wanted), -n))


def ladder(group: Group, ranking: np.ndarray, least: int, step: int) -> Ladder:
    """The ladder of axes that keep the same units.

    Args:
        group: the axes.
        ranking: what ranks their units, (units,); larger stays longer.
        least: so many units stay at least.
        step: kept counts are multiples of it.
    """
    axis = group.first
    # a stable sort, and among equals the highest number goes first, so the lowest ones stay
    order = np.argsort(ranking[::-1], kind="stable")
    order = axis.size - 1 - order
    least = min(axis.size, math.ceil(least / step) * step)
    below = range(axis.size // step * step, -1, -step)
    rungs = (axis.size, *(n for n in below if least <= n < axis.size))
    return Ladder(group, order, rungs)


@dataclass(frozen=True)
class Problem:
    """How many units each axis keeps is to be found.

    Attributes:
        structure: of the model.
        ladders: of every group of axes, in model order.
        values: name of a ladder's axis -> (units,), what each unit is worth, made comparable.
        budget: what the counts must meet.
    """

    structure: Structure
    ladders: Sequence[Ladder]
    values: Mapping[str, np.ndarray]
    budget: Budget

    @cached_property
    def limit(self) -> int:
        """The largest cost allowed, of a budget that is one."""
        return self.budget.limit(predict_cost(self.structure))

    def cost(self, counts: Sequence[int]) -> int:
        """What counts cost, one for each ladder, in the measure of the budget.

        Which units an axis keeps does not change it, except where their number reaches zero.
        """
        named = zip(self.ladders, counts, strict=True)
        kept = {name: count for ladder, count in named for name in ladder.group.names}
        return getattr(Reading.of_counts(self.structure, kept), self.budget.measure)

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether counts meet the budget."""
        return self.cost(counts) <= self.limit

    def smallest(self) -> list[int]:
        """The lowest rung of every ladder.

        Raises:
            InfeasibleBudget: even that costs more than the budget.
        """
        counts = [ladder.rungs[-1] for ladder in self.ladders]
        smallest = self.cost(counts)
        if smallest > self.limit:
            measure = self.budget.measure
            whole = getattr(predict_cost(self.structure), measure)
            raise InfeasibleBudget(
                f"plan: budget must allow at least {smallest:,} {measure} "
                f"({smallest / whole:.3f} of the model), the smallest plan with these scores, "
                f"min_units and round_to, got {self.limit:,} ({self.limit / whole:.3f})"
            )
        return counts
