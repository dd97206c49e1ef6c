"""The strategies on curves that are known, beside the best that all candidates have."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitprune_fast.search.candidate import Candidate
from vitprune_fast.search.strategies import (
    Counts,
    Iterative,
    Spent,
    bisected,
    by_cost,
    equal_macs,
    fixed,
    fixed_within,
    grid,
    most_within,
    peak,
    told_apart,
)

DENSE = 0.8
VALUES = [tenth / 10 for tenth in range(10)]
ROUNDS, STEP, ROUND_CUT = 4, 0.01, 0.5
BOUND = ROUNDS * 2 * (1 + math.ceil(math.log2(ROUND_CUT / STEP)))
# as in DeiT-B: so many units, and what part of the cost is theirs
UNITS = {"head": 144, "neuron": 4608}
SHARES = {"head": 0.34, "neuron": 0.62}

Curve = Callable[..., float]
# how much accuracy goes at two ratios
CURVES: dict[str, Curve] = {
    "squares": lambda a, f: 0.05 * a * a + 0.03 * f * f,
    "heads matter": lambda a, f: 0.5 * a * a + 0.01 * f * f,
    "neurons matter": lambda a, f: 0.01 * a * a + 0.5 * f * f,
    "lines": lambda a, f: 0.02 * a + 0.03 * f,
    "flat, then steep": lambda a, f: 0.1 * a**4 + 0.1 * f**4,
    "exponential": lambda a, f: 0.001 * (math.exp(5 * a) + math.exp(4 * f) - 2),
    "together": lambda a, f: 0.05 * a * a + 0.03 * f * f + 0.1 * a * f,
    "cliffs": lambda a, f: 0.001 * (a + f) + max(0, a - 0.35) + max(0, f - 0.55),
    "steep, then flat": lambda a, f: 0.01 * a**0.5 + 0.006 * f**0.5,
    "neurons are free": lambda a, f: 0.001 * a,
}


class OnCurve:
    """Candidates whose accuracy is that of a curve, and whose cost is linear."""

    def __init__(
        self,
        curve: Curve,
        units: Mapping[str, int] = UNITS,
        shares: Mapping[str, float] = SHARES,
        most: int = 10**6,
    ):
        self.curve, self.units, self.shares = curve, units, shares
        self.most, self.found = most, dict[tuple[int, ...], Candidate]()
        self.committed = list[Candidate]()

    @property
    def left(self) -> int:
        return self.most - len(self.found)

    def macs(self, counts: Counts) -> int:
        parts = (self.shares[kind] * counts[kind] / n for kind, n in self.units.items())
        return round(1e9 * (1 - sum(self.shares.values()) + sum(parts)))

    def top1(self, counts: Counts) -> float:
        return DENSE - self.curve(*(1 - counts[kind] / n for kind, n in self.units.items()))

    def measure(self, counts: Counts, step: str, needed: float | None = None) -> Candidate:
        key = tuple(counts.values())
        if key not in self.found:
            if self.left <= 0:
                raise Spent
            ratios = {kind: 1 - counts[kind] / n for kind, n in self.units.items()}
            nothing: Any = None
            found = (self.macs(counts), 0, self.top1(counts), None, 1, True, "", nothing)
            self.found[key] = Candidate(step, ratios, dict(counts), *found)
        return self.found[key]

    def commit(self, candidate: Candidate) -> None:
        self.committed.append(candidate)


def cuts(trials: OnCurve, tolerance: float, limit: int | None = None) -> list[Candidate]:
    """The unpruned model and what the rounds cut of it, with the search's own settings."""
    dense = trials.measure(trials.units, "unpruned")
    Iterative(tolerance, 0.0, ROUNDS, STEP, ROUND_CUT, limit).run(trials, dense)
    return [dense, *trials.committed]


def one_step(left: int) -> int:
    """Units of one step of a cut."""
    return max(1, round(STEP * left))


def halved(before: int, left: int) -> bool:
    """Whether a cut was as deep as a round may cut, in whole steps."""
    return left <= (1 - ROUND_CUT) * before + one_step(before)


def worth(candidate: Candidate) -> float:
    return candidate.top1


@pytest.mark.parametrize("tolerance", [0.005, 0.01])
@pytest.mark.parametrize("name", CURVES)
def test_rounds_end_where_no_kind_can_be_cut_by_another_step(name: str, tolerance: float) -> None:
    trials = OnCurve(CURVES[name])
    path = cuts(trials, tolerance)
    last, evaluated = path[-1], len(trials.found)
    assert last.top1 >= DENSE - tolerance and evaluated <= BOUND
    for kind, left in last.kept.items():
        # the optimum along this kind, from here, by looking at every count
        deepest = min(
            n for n in range(left + 1) if trials.top1({**last.kept, kind: n}) >= DENSE - tolerance
        )
        before = min((c.kept[kind] for c in path if c.kept[kind] > left), default=left)
        assert left - deepest <= one_step(left) or halved(before, left)


@pytest.mark.parametrize("tolerance", [0.005, 0.01])
@pytest.mark.parametrize("name", CURVES)
def test_rounds_find_what_the_grid_finds_with_fewer_evaluations(
    name: str, tolerance: float
) -> None:
    on_grid, in_rounds = OnCurve(CURVES[name]), OnCurve(CURVES[name])
    grid(on_grid, VALUES, DENSE - tolerance)
    cuts(in_rounds, tolerance)
    found, best = (
        by_cost(trials.found.values(), DENSE - tolerance)[-1] for trials in (in_rounds, on_grid)
    )
    assert found.macs <= best.macs
    assert len(on_grid.found) == 100 and len(in_rounds.found) <= 60


@pytest.mark.parametrize("tolerance", [0.005, 0.01])
@pytest.mark.parametrize("name", CURVES)
def test_one_ratio_is_the_largest_of_all_that_hold(name: str, tolerance: float) -> None:
    trials = OnCurve(CURVES[name])
    fixed(trials, STEP, DENSE - tolerance)
    every = ({k: round((1 - n / 100) * size) for k, size in UNITS.items()} for n in range(100))
    wanted = min(trials.macs(c) for c in every if trials.top1(c) >= DENSE - tolerance)
    found = by_cost([trials.measure(UNITS, "unpruned"), *trials.found.values()], DENSE - tolerance)
    assert found[-1].macs == wanted
    assert len(trials.found) <= 1 + 2 + math.ceil(math.log2(1 / STEP))


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 1.0])
def test_one_ratio_within_a_cost_is_the_smallest(share: float) -> None:
    trials, limit = OnCurve(CURVES["squares"]), round(1e9 * share)
    counts = fixed_within(trials, limit)
    left = {kind: counts[kind] / size for kind, size in UNITS.items()}
    assert abs(left["head"] - left["neuron"]) <= 1 / UNITS["head"]
    assert trials.macs(counts) <= limit and not trials.found
    more = {kind: round((left["neuron"] + 0.001) * size) for kind, size in UNITS.items()}
    assert trials.macs(more) > limit or share == 1.0


def test_one_ratio_is_the_best_so_far_when_evaluations_are_spent() -> None:
    trials = OnCurve(CURVES["squares"], most=3)
    fixed(trials, STEP, DENSE - 0.01)
    assert len(trials.found) == 3 and by_cost(trials.found.values(), DENSE - 0.01)


@given(threshold=st.floats(0, 1), tolerance=st.floats(0.001, 0.1))
def test_one_kind_alone_is_cut_to_the_optimum(threshold: float, tolerance: float) -> None:
    """Found by looking at every count; a round cuts half at most."""
    trials = OnCurve(lambda r: max(0.0, r - threshold), {"neuron": 1000}, {"neuron": 0.9})
    path = [each.kept["neuron"] for each in cuts(trials, tolerance)]
    left = path[-1]
    wanted = min(n for n in range(1001) if trials.top1({"neuron": n}) >= DENSE - tolerance)
    assert wanted <= left
    assert left - wanted <= one_step(left) or halved(path[-2], left)
    assert len(trials.found) <= ROUNDS * (1 + math.ceil(math.log2(ROUND_CUT / STEP))) + 1


def test_a_better_kind_is_cut_first() -> None:
    trials = OnCurve(CURVES["heads matter"])
    first = cuts(trials, 0.01)[1]
    assert first.kept["head"] == UNITS["head"] and first.kept["neuron"] < UNITS["neuron"]


def test_rounds_stop_at_the_cost_that_is_asked_for() -> None:
    trials = OnCurve(CURVES["neurons are free"])
    limit = 700_000_000
    last = cuts(trials, 0.01, limit)[-1]
    left, step = last.kept["neuron"], one_step(UNITS["neuron"])
    assert last.macs <= limit < trials.macs({**last.kept, "neuron": left + step})
    whole = OnCurve(CURVES["squares"])
    assert len(cuts(whole, 0.01, limit=10**9)) == 1 == len(whole.found)


@pytest.mark.parametrize("most", range(3, 40, 3))
def test_rounds_end_with_what_they_have_when_evaluations_are_spent(most: int) -> None:
    trials, whole = OnCurve(CURVES["squares"], most=most), OnCurve(CURVES["squares"])
    stopped, undisturbed = cuts(trials, 0.005), cuts(whole, 0.005)
    assert len(trials.found) <= most and stopped[-1].top1 >= DENSE - 0.005
    assert [*trials.found] == [*whole.found][: len(trials.found)]
    # the last cut may be one that bisection was not done with
    assert [cut.kept for cut in stopped[:-1]] == [
        cut.kept for cut in undisturbed[: len(stopped) - 1]
    ]


def test_a_round_that_cuts_nothing_costs_nothing_later() -> None:
    """A unit costs more than the first rounds allow, and less than all of them."""
    trials = OnCurve(lambda a: 0.008 * (a > 0), {"head": 4}, {"head": 0.5})
    assert cuts(trials, 0.01)[-1].kept["head"] == 0 or len(trials.found) <= 5
    assert (
        cuts(OnCurve(lambda a: 0.02 * (a > 0), {"head": 4}, {"head": 0.5}), 0.01)[-1].kept["head"]
        == 4
    )


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
def test_bisection_finds_the_last_step_that_holds(most: int, last: int, first: int) -> None:
    last, first, asked = min(last, most), min(first, most), []

    def holds(step: int) -> bool:
        asked.append(step)
        return step <= last

    assert bisected(holds, most, first) == last
    assert all(1 <= step <= most for step in asked)
    # from the middle it is bisection, and one step more is asked for
    asked.clear()
    bisected(holds, most, (most + 1) // 2)
    assert len(asked) <= 2 + math.ceil(math.log2(most + 1))


def test_the_step_behind_the_first_refused_one_may_hold() -> None:
    assert bisected({1, 2, 3, 5}.__contains__, 8, 4) == 5
    assert bisected({1, 2, 3, 6}.__contains__, 8, 4) == 3
    assert bisected({2}.__contains__, 2, 1) == 2


@given(rises=st.lists(st.integers(0, 50), min_size=1, max_size=300), limit=st.integers(-10, 8000))
def test_the_most_within_a_limit(rises: list[int], limit: int) -> None:
    costs = [sum(rises[:n]) for n in range(len(rises))]
    asked = []

    def cost(n: int) -> int:
        asked.append(n)
        return costs[n]

    wanted = max((n for n, value in enumerate(costs) if value <= limit), default=0)
    assert most_within(cost, len(costs) - 1, limit) == wanted
    # every other one halves what is left
    assert len(asked) <= 2 + 2 * math.ceil(math.log2(len(costs)))


@pytest.mark.parametrize("points", range(1, 150))
def test_fibonacci_search_finds_every_peak(points: int) -> None:
    allowed = next(n for n in range(1, 12) if told_apart(n) >= points)
    for best in range(points):
        asked = set[int]()

        def height(place: int, best: int = best, asked: set[int] = asked) -> int:
            asked.add(place)
            # steeper on one side
            return -abs(place - best) * (1 + (place > best))

        found = peak(height, points)
        height(found)
        assert found == best and len(asked) <= allowed


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("name", CURVES)
def test_at_one_cost_the_best_pair_is_found(name: str, share: float) -> None:
    trials, limit = OnCurve(CURVES[name], most=11), round(1e9 * share)
    tried = equal_macs(trials, limit, worth)
    every = []
    for heads in range(UNITS["head"] + 1):
        counts = {"head": heads, "neuron": 0}
        if trials.macs(counts) <= limit:
            neurons = most_within(
                lambda n, heads=heads: trials.macs({"head": heads, "neuron": n}),
                UNITS["neuron"],
                limit,
            )
            every.append(trials.top1({"head": heads, "neuron": neurons}))
    assert math.isclose(tried[-1].top1, max(every), abs_tol=1e-12) and len(trials.found) <= 11
    assert "one ratio" in {candidate.step for candidate in tried}
    # all miss the cost by less than a neuron, unless none is left to keep
    neuron = 1e9 * SHARES["neuron"] / UNITS["neuron"]
    assert all(0 <= limit - c.macs <= neuron or c.kept["neuron"] == UNITS["neuron"] for c in tried)


def test_of_three_kinds_one_after_the_other_has_its_line() -> None:
    units = {"head": 24, "neuron": 96, "embed": 32}
    shares = {"head": 0.2, "neuron": 0.4, "embed": 0.3}

    def curve(head: float, neuron: float, embed: float) -> float:
        return 0.3 * head**2 + 0.05 * neuron**2 + 0.1 * embed**2

    trials, limit = OnCurve(curve, units, shares, most=21), 600_000_000
    best = equal_macs(trials, limit, worth)[-1]
    assert len(trials.found) <= 21
    every = (
        trials.top1({"head": head, "neuron": neuron, "embed": embed})
        for head, neuron, embed in product(*(range(n + 1) for n in units.values()))
        if trials.macs({"head": head, "neuron": neuron, "embed": embed}) <= limit
    )
    optimum = max(every)
    same = next(c for c in trials.found.values() if c.step == "one ratio")
    assert optimum - best.top1 <= 0.1 * (optimum - same.top1)


def test_one_kind_alone_follows_from_the_cost() -> None:
    trials = OnCurve(lambda a: a, {"head": 10}, {"head": 0.5})
    (only,) = equal_macs(trials, 800_000_000, worth)
    assert only.kept == {"head": 6} and len(trials.found) == 1


def test_the_grid_takes_the_cheapest_and_then_the_most_accurate() -> None:
    rng = random.Random(0)
    noise = {pair: rng.random() for pair in product(range(5), repeat=2)}
    trials = OnCurve(
        lambda a, b: noise[round(4 * a), round(4 * b)],
        {"head": 4, "neuron": 4},
        {"head": 0.4, "neuron": 0.4},
    )
    grid(trials, [0, 0.25, 0.5, 0.75, 1], DENSE - 0.5)
    feasible = by_cost(trials.found.values(), DENSE - 0.5)
    every = [c for c in trials.found.values() if c.top1 >= DENSE - 0.5]
    assert len(trials.found) == 25 and len(feasible) == len(every)
    assert feasible[-1] == min(every, key=lambda c: (c.macs, -c.top1))


def test_among_candidates_that_are_cheap_enough_the_most_accurate_is_taken() -> None:
    trials = OnCurve(lambda a: 0.1 * a, {"head": 10}, {"head": 1.0})
    every = [trials.measure({"head": left}, "any") for left in range(11)]
    assert by_cost(every, DENSE - 0.05)[-1].kept["head"] == 5
    assert by_cost(every, DENSE - 0.05, limit=700_000_000)[-1].kept["head"] == 7
    assert by_cost(every, DENSE - 0.05, limit=300_000_000)[-1].kept["head"] == 5
    assert by_cost(every, DENSE)[-1].kept["head"] == 10
