"""Which candidates to try: a grid, cuts in rounds by bisection, one ratio, or all of one cost.

A strategy knows how many units of every kind there are and what counts of them cost, and asks for
measurements. Nothing here knows of models, masks or files.

Reference: Feng et al., "Automatic hyper-parameter search for Vision Transformer pruning", PRAI
2023, of which only the abstract is public: one ratio for attention and one for the MLPs, searched
for, and in the better form by iterative pruning and binary search. The rest is our design.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any, Protocol

from .candidate import Candidate

Counts = Mapping[str, int]
"""Unit kind -> how many of its units stay."""

PROBED = 0.05
"""Share of the units that are left which a probe cuts."""
ONE_RATIO = "one ratio"
"""What candidates with the same ratio for all kinds are tried for."""


class Spent(Exception):
    """There are no evaluations left."""


class Trials(Protocol):
    """What a strategy knows of candidates, and how it asks for one."""

    @property
    def units(self) -> Counts:
        """How many units of each searched kind the model has."""
        ...

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        ...

    def macs(self, counts: Counts) -> int:
        """Multiply-accumulates of a candidate; costs no evaluation."""
        ...

    def measure(self, counts: Counts, step: str, needed: float | None = None) -> Candidate:
        """A candidate, evaluated unless it was before.

        Args:
            counts: of the units that stay.
            step: what it is tried for.
            needed: top-1 that makes it feasible; None takes any.

        Raises:
            Spent: it would have to be evaluated, and there are no evaluations left.
        """
        ...

    def commit(self, candidate: Candidate) -> None:
        """Later candidates cut further into this one."""
        ...


def grid(trials: Trials, values: Sequence[float], needed: float) -> None:
    """Try every combination of ratios, in their order.

    Args:
        trials: evaluates candidates.
        values: shares of the units of a kind that go.
        needed: top-1 of a feasible candidate.
    """
    for ratios in product(values, repeat=len(trials.units)):
        trials.measure(_without(trials.units, ratios), "grid", needed)


def fixed(trials: Trials, step: float, needed: float) -> list[Counts]:
    """Cut all kinds by the largest common ratio that is found to hold, by bisection.

    Args:
        trials: evaluates candidates.
        step: ratios are multiples of it, below 1.
        needed: top-1 of a feasible candidate.

    Returns:
        What all ratios up to that one leave, the least of them last.
    """
    held, most = 0, math.ceil(1 / step) - 1

    def left(steps: int) -> Counts:
        return _without(trials.units, [steps * step] * len(trials.units))

    def holds(steps: int) -> bool:
        nonlocal held
        if trials.measure(left(steps), ONE_RATIO, needed).top1 < needed:
            return False
        held = max(held, steps)
        return True

    with contextlib.suppress(Spent):
        bisected(holds, most, (most + 1) // 2)
    return [left(steps) for steps in range(held + 1)]


def fixed_within(trials: Trials, limit: int) -> Counts:
    """What the smallest common ratio, in thousandths, leaves within a cost."""

    def left(thousandths: int) -> Counts:
        return _without(trials.units, [1 - thousandths / 1000] * len(trials.units))

    return left(most_within(lambda n: trials.macs(left(n)), 1000, limit))


def _without(units: Counts, ratios: Sequence[float]) -> Counts:
    """What stays when these shares of the units go."""
    pairs = zip(units.items(), ratios, strict=True)
    return {kind: round((1 - ratio) * size) for (kind, size), ratio in pairs}


def by_cost(
    candidates: Iterable[Candidate], needed: float, limit: int | None = None
) -> list[Candidate]:
    """The feasible ones, the cheapest last; of equals the more accurate.

    Args:
        candidates: that were tried.
        needed: top-1 of a feasible one.
        limit: multiply-accumulates that are cheap enough; what has fewer is no better for that.
    """
    feasible = [candidate for candidate in candidates if candidate.top1 >= needed]
    return sorted(feasible, key=lambda each: (-max(each.macs, limit or 0), each.top1))


@dataclass(frozen=True)
class Iterative:
    """Cuts in rounds, each as deep as the part of the tolerance allows that is spent until then.

    In round ``t`` of ``T`` a candidate may lose ``tolerance * t / T``. A probe of every kind says
    which saves more for a point lost, and that one is cut first. How deep is found by bisection
    over steps, which begins where the loss of the probe leads in a straight line. A round that cuts
    nothing costs nothing later: what it tried is judged again by what the next one allows.

    Args:
        tolerance: top-1 that may be lost in the end.
        margin: top-1 that a candidate may lack besides, for the noise of few images.
        rounds: T.
        step: of a cut, as a share of the units that are left of its kind; a unit at least.
        round_cut: largest share of the units that are left which a round cuts.
        limit: multiply-accumulates at which it ends; None goes as far as the tolerance.
    """

    tolerance: float
    margin: float
    rounds: int
    step: float
    round_cut: float
    limit: int | None

    def run(self, trials: Trials, dense: Candidate) -> None:
        """Cut until no round or no evaluation is left, or the model is cheap enough.

        Args:
            trials: evaluates candidates.
            dense: the model as it is.
        """
        here = dense
        if self._reaches(here.macs):
            return
        try:
            for number in range(1, self.rounds + 1):
                needed = dense.top1 - self.tolerance * number / self.rounds - self.margin
                name = f"round {number}"
                for kind, rate in self._order(trials, here, name, needed):
                    deepest = self._deepest(trials, here, kind, rate, name, needed)
                    if deepest.macs < here.macs:
                        here = deepest
                        trials.commit(here)
                    if self._reaches(here.macs):
                        return
        except Spent:
            return

    def _reaches(self, macs: int) -> bool:
        """Whether nothing more has to be cut."""
        return self.limit is not None and macs <= self.limit

    def _order(
        self, trials: Trials, here: Candidate, name: str, needed: float
    ) -> list[tuple[str, float]]:
        """The kinds that can be cut, those first that save most for a point lost.

        Each with how many steps it takes to lose all of the accuracy, by its probe in a straight
        line.
        """
        found = []
        for kind in trials.units:
            steps = max(1, round(PROBED * here.kept[kind] / self._size(here, kind)))
            counts = self._after(here, kind, steps)
            probe = trials.measure(counts, f"{name}, probe of {kind}", needed)
            saved, lost = here.macs - probe.macs, max(here.top1 - probe.top1, 0.0)
            if saved > 0:
                worth, rate = (saved / lost, steps / lost) if lost else (math.inf, math.inf)
                found.append((worth, saved, kind, rate))
        # a stable sort: equals stay in the order of the kinds
        found.sort(key=lambda each: each[:2], reverse=True)
        return [(kind, rate) for _, _, kind, rate in found]

    def _deepest(
        self, trials: Trials, here: Candidate, kind: str, rate: float, name: str, needed: float
    ) -> Candidate:
        """The deepest cut of one kind that is found to hold."""
        tried = {0: here}

        def holds(steps: int) -> bool:
            counts = self._after(here, kind, steps)
            tried[steps] = trials.measure(counts, f"{name}, {kind}", needed)
            return tried[steps].top1 >= needed

        most = max(1, int(self.round_cut * here.kept[kind] / self._size(here, kind)))
        if self.limit is not None:
            # accuracy lost beyond the goal is lost for nothing
            most = 1 + bisect_left(
                range(1, most),
                True,
                key=lambda n: self._reaches(trials.macs(self._after(here, kind, n))),
            )
        room = here.top1 - needed
        first = most if rate == math.inf else max(1, min(most, int(room * rate)))
        try:
            return tried[bisected(holds, most, first)]
        except Spent:
            return tried[max(n for n, cut in tried.items() if cut.top1 >= needed)]

    def _size(self, here: Candidate, kind: str) -> int:
        """Units of one step."""
        return max(1, round(self.step * here.kept[kind]))

    def _after(self, here: Candidate, kind: str, steps: int) -> Counts:
        """What stays when one kind is cut by so many steps."""
        return {**here.kept, kind: max(0, here.kept[kind] - steps * self._size(here, kind))}


def bisected(holds: Callable[[int], bool], most: int, first: int) -> int:
    """The largest step that is found to hold, out of 0 to ``most``; 0 does.

    Steps double from the first one until one does not hold; then bisection. Accuracy need not fall
    with every step, so the one after the lowest that was refused is tried as well.

    Args:
        holds: whether a step from 1 on does.
        most: steps that are possible.
        first: where to begin, from 1 on.
    """
    low, high, place = 0, most + 1, first
    while high - low > 1:
        if holds(place):
            low = place
        else:
            high = place
        place = min(2 * low, most) if high > most else (low + high) // 2
    return low + 2 if low + 2 <= most and holds(low + 2) else low


def equal_macs(trials: Trials, limit: int, worth: Callable[[Candidate], Any]) -> list[Candidate]:
    """Candidates of one cost: one ratio for all kinds, then separate ones.

    One kind follows from the others: it keeps as many units as the limit leaves to it. Of two kinds
    that leaves a line of candidates, on which Fibonacci search finds the best one. Of more kinds
    one after the other gets a line, through the best candidate so far, as long as that helps.

    Args:
        trials: evaluates candidates.
        limit: multiply-accumulates of all candidates, which miss it by less than what a unit of the
            kind that follows takes, as far as that has units.
        worth: of a candidate; larger is better.

    Returns:
        All candidates by rising worth.
    """
    units = trials.units
    # the kind that has most to give
    follower = min(units, key=lambda kind: trials.macs({**units, kind: 0}))
    free = [kind for kind in units if kind != follower]

    def most_of(kind: str, counts: Counts) -> int:
        return most_within(lambda n: trials.macs({**counts, kind: n}), units[kind], limit)

    def measure(counts: Counts, step: str) -> Candidate:
        return trials.measure({**counts, follower: most_of(follower, counts)}, step)

    tried = [measure(fixed_within(trials, limit), ONE_RATIO)]

    def line(kind: str, kinds_left: int) -> None:
        """Try counts of one kind between where the kind that follows has all and has none."""
        kept = max(tried, key=worth).kept
        low = most_of(kind, {**kept, follower: units[follower]})
        high = most_of(kind, {**kept, follower: 0})
        places = _spread(low, high, told_apart(trials.left // kinds_left))
        found: dict[int, Candidate] = {}

        def worth_at(place: int) -> Any:
            if place not in found:
                found[place] = measure({**kept, kind: places[place]}, f"separate ratios, {kind}")
                tried.append(found[place])
            return worth(found[place])

        worth_at(peak(worth_at, len(places)))

    try:
        best = None
        while free and best is not max(tried, key=worth):
            best = max(tried, key=worth)
            for place, kind in enumerate(free):
                line(kind, len(free) - place)
    except Spent:
        pass
    return sorted(tried, key=worth)


def most_within(cost: Callable[[int], int], most: int, limit: int) -> int:
    """The largest count from 0 to ``most`` whose cost is within a limit; 0 where none is.

    Interpolation and bisection take turns: costs are nearly linear, but may rise in stairs.

    Args:
        cost: of a count, rising with it.
        most: the largest count.
        limit: the largest cost.
    """
    low, high = 0, most
    below, above = cost(low), cost(high)
    if above <= limit or below > limit:
        return most if above <= limit else 0
    for turn in count():
        if high - low <= 1:
            break
        share = 0.5 if turn % 2 else (limit - below) / (above - below)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        found = cost(middle)
        if found <= limit:
            low, below = middle, found
        else:
            high, above = middle, found
    return low


def _spread(low: int, high: int, most: int) -> list[int]:
    """All whole numbers from one to another, or so many of them, evenly spread."""
    points = min(most, high - low + 1)
    if points == 1:
        return [(low + high) // 2]
    return [low + round(place * (high - low) / (points - 1)) for place in range(points)]


def told_apart(evaluations: int) -> int:
    """Points among which ``peak`` finds the best one by so many evaluations."""
    numbers = 1, 2
    for _ in range(max(1, evaluations)):
        numbers = numbers[1], sum(numbers)
    return numbers[0] - 1


def peak(worth: Callable[[int], Any], points: int) -> int:
    """The best of so many points, where worth first rises and then falls.

    Fibonacci search (Kiefer, "Sequential minimax search for a maximum", Proceedings of the AMS 4,
    1953), which is golden section on whole numbers: a point is evaluated for each Fibonacci number
    up to the number of points.

    Args:
        worth: of a point from 0 on; must be cheap where it is asked again.
        points: how many there are, 1 at least.
    """
    # the best point lies between low and low + wide, both excluded
    low, narrow, wide = -1, 1, 2
    while wide <= points:
        narrow, wide = wide, narrow + wide
    while wide > 2:
        left, right = low + wide - narrow, low + narrow
        if right < points and worth(right) > worth(left):
            low = left
        narrow, wide = wide - narrow, narrow
    return low + 1
