"""Most value per cost first, along the lower convex hull of every layer's own curve."""

from __future__ import annotations

from itertools import pairwise

from ...errors import InvalidInput
from ..problem import Problem

Point = tuple[float, float, int]
"""Share of the budget that so many units of a layer take, what is lost, and the units."""


def allocate(problem: Problem) -> list[int]:
    """Climbs from the smallest plan; within a layer steps are taken in order.

    Values have to add up, as squares do (`reduction="square"`, `normalization="none"`): no scale
    between unit kinds is needed then.
    """
    if problem.keep is not None:
        raise InvalidInput("plan: budget must be in macs or params for 'hulls', got keep")
    counts = problem.smallest
    steps = []
    for number, points in enumerate(curves(problem)):
        for (load, lost, _), (more, less, units) in pairwise(lower_hull(points)):
            steps.append(((lost - less) / (more - load), number, units))
    stuck = set[int]()
    for _, number, units in sorted(steps, key=lambda step: (-step[0], step[1:])):
        trial = [*counts[:number], units, *counts[number + 1 :]]
        if number in stuck or not problem.fits(trial):
            stuck.add(number)
        else:
            counts = trial
    return counts


def curves(problem: Problem) -> list[list[Point]]:
    """Of each layer, the others whole: its points from the smallest to all of its units."""
    whole = [ladder.rungs[0] for ladder in problem.ladders]
    found = []
    for number, ladder in enumerate(problem.ladders):
        values = problem.values[ladder.axis.name]
        points = []
        for units in reversed(ladder.rungs):
            load = problem.load([*whole[:number], units, *whole[number + 1 :]])
            points.append((load, float(values[: len(values) - units].sum()), units))
        found.append(points)
    return found


def lower_hull(points: list[Point]) -> list[Point]:
    """The points below which none of the others lies, by rising cost."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(one: Point, middle: Point, other: Point) -> bool:
    """Whether the middle point lies on or above the line through the others."""
    return (middle[1] - one[1]) * (other[0] - one[0]) >= (other[1] - one[1]) * (middle[0] - one[0])
