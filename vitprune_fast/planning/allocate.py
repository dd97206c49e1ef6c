"""Spread a budget over the axes: how many units each keeps, and which."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import neg
from typing import Literal

import numpy as np
from torch import nn

from ..errors import InfeasibleBudget, InvalidInput
from ..scoring.scores import Scores
from ..structure import Axis, Group, Structure, describe
from ..structure.reading import Reading
from .budget import Budget
from .cost import predict_cost
from .plan import Plan

NORMALIZATIONS = (
    "none",
    "l2_per_layer",
    "mean_per_group",
    "isomorphic",
    "per_mac",
    "lamp",
    "latency",
)
# kinds whose saving depends on how many units go, and not on which
PLANNED_KINDS = ("head", "neuron", "embed")
ALLOCATIONS = ("global", "uniform")
Normalization = Literal[
    "none", "l2_per_layer", "mean_per_group", "isomorphic", "per_mac", "lamp", "latency"
]
PerKind = int | Mapping[str, int]


def plan(
    model: nn.Module | Structure,
    scores: Scores,
    budget: Budget,
    allocation: Literal["global", "uniform"] = "global",
    normalization: Normalization | None = None,
    min_units: PerKind = 1,
    round_to: PerKind = 1,
    units: Sequence[str] = ("head", "neuron"),
    latency_saved: Mapping[str, float] | None = None,
    latency_weight: float = 1.0,
) -> Plan:
    """Choose the units to keep.

    Axes whose parameters are tied keep the same units, ranked by the sum of their scores.

    ``uniform`` keeps the same share of every axis of a kind and drops the lowest scores of each.
    ``global`` ranks units of all axes together after normalisation and drops the lowest until the
    budget is met, then takes back the best ones that still fit. Ties go to the lower axis and unit
    number; nothing random is drawn.

    Args:
        model: the model the scores belong to, or its Structure.
        scores: which units count; only axes with scores are cut.
        budget: in multiply-accumulates, parameters, or shares to keep.
        allocation: ``"global"`` or ``"uniform"``.
        normalization: makes axes comparable before a global ranking. None takes ``per_mac`` for
            squares (``reduction="square"``), which are all of one unit, and ``isomorphic`` for
            other scores (docs/adr/0001-plan-normalisation.md has what they keep). ``none``;
            ``l2_per_layer`` divides by the axis' L2 norm (Michel et al. 2019); ``mean_per_group``
            by its mean (Fang et al. 2023); ``isomorphic`` ranks inside one unit kind, after
            ``l2_per_layer``, and cuts all kinds by the same share (Fang et al. 2024); ``per_mac``
            divides by the multiply-accumulates the unit saves; ``lamp`` divides the square by the
            sum of squares of all units of the axis that score at least as much (Lee et al. 2021);
            ``latency`` subtracts ``latency_weight * latency_saved[axis]`` after ``l2_per_layer``
            (Yang et al. 2023).
        min_units: at least so many units stay in every axis, or by kind ``{"head": 0}``.
        round_to: kept counts are multiples of this, or by kind ``{"neuron": 8}``; an axis with
            fewer units than that is kept whole.
        units: unit kinds to cut, among ``head``, ``neuron`` and ``embed``; the scores may hold
            others, whose units all stay (what a budget saves by them is not a matter of counts).
        latency_saved: axis name -> seconds saved by one unit of it, for ``latency``.
        latency_weight: score per second, for ``latency``.

    Returns:
        A Plan. The cost predicted for it is exactly that of the pruned model, and at most the
        budget. ``global`` misses it by less than one step of an axis (``round_to`` units), unless
        all steps left are larger; ``uniform`` by less than one step of all axes of a kind.

    Raises:
        InfeasibleBudget: even the smallest plan allowed costs more; the message names its cost.
        InvalidInput: an argument has a value that cannot be used, or the scores belong to another
            model or are not finite.
    """
    structure = model if isinstance(model, Structure) else describe(model)
    if allocation not in ALLOCATIONS:
        raise InvalidInput(
            f"plan: allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}"
        )
    if normalization is None:
        normalization = "per_mac" if scores.reduction == "square" else "isomorphic"
    if normalization not in NORMALIZATIONS:
        raise InvalidInput(
            f"plan: normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
        )
    groups = _scored_groups(structure, scores, units)
    axes = [group.first for group in groups]
    raw = {group.first.name: _ranking(scores, group) for group in groups}
    ladders = [
        _ladder(group, raw, _per_kind("min_units", min_units, axis), _step(round_to, axis))
        for group, axis in zip(groups, axes, strict=True)
    ]
    if budget.measure == "keep":
        assert budget.keep is not None
        if unscored := budget.keep.keys() - {axis.kind for axis in axes}:
            raise InvalidInput(
                f"plan: scores must cover the unit kinds of the budget, got none for "
                f"{sorted(unscored)[0]!r}"
            )
    values = _normalised(structure, raw, groups, normalization, latency_saved, latency_weight)
    if allocation == "uniform":
        counts = _uniform(structure, ladders, budget)
    else:
        counts = _global(structure, ladders, values, budget)
    return Plan.of(
        structure,
        {
            name: ladder.keep(count)
            for ladder, count in zip(ladders, counts, strict=True)
            for name in ladder.group.names
        },
    )


@dataclass(frozen=True)
class _Ladder:
    """Allowed kept-counts (descending) and removal order of axes that keep the same units."""

    group: Group
    # unit numbers, least important first
    order: np.ndarray
    # allowed numbers of kept units, from all of them down to the minimum
    rungs: tuple[int, ...]

    @property
    def axis(self) -> Axis:
        """The one that stands for all."""
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


def _ranking(scores: Scores, group: Group) -> np.ndarray:
    """What ranks the units of axes that keep the same ones."""
    rankings = [scores.ranking(name).numpy() for name in group.names if name in scores]
    return np.sum(rankings, axis=0)


def _ladder(group: Group, raw: Mapping[str, np.ndarray], least: int, step: int) -> _Ladder:
    axis = group.first
    ranking = raw[axis.name]
    # a stable sort, and among equals the highest number goes first, so the lowest ones stay
    order = np.argsort(ranking[::-1], kind="stable")
    order = axis.size - 1 - order
    least = min(axis.size, math.ceil(least / step) * step)
    below = range(axis.size // step * step, -1, -step)
    rungs = (axis.size, *(n for n in below if least <= n < axis.size))
    return _Ladder(group, order, rungs)


def _scored_groups(structure: Structure, scores: Scores, units: Sequence[str]) -> list[Group]:
    """The axes to cut, each with those that keep the same units."""
    if isinstance(units, str) or not set(units) <= set(PLANNED_KINDS) or not units:
        raise InvalidInput(
            f"plan: units must be a list of kinds among {', '.join(PLANNED_KINDS)}, got {units!r}"
        )
    for name, value in scores.items():
        axis = structure.axes.get(name)
        if axis is None or len(value) != axis.size:
            raise InvalidInput(
                f"plan: scores must belong to this model, got {len(value)} scores for {name!r}, "
                f"which has {axis.size if axis else 'no'} units"
            )
        if not value.isfinite().all():
            raise InvalidInput(f"plan: scores must be finite, got NaN or Inf in {name!r}")
    if not len(scores):
        raise InvalidInput("plan: scores must cover at least one axis, got none")
    axes = [axis for axis in structure.axes.values() if axis.name in scores and axis.kind in units]
    if not axes:
        kinds = sorted({structure.axes[name].kind for name in scores})
        raise InvalidInput(
            f"plan: scores must cover a unit kind of {', '.join(units)}, got {', '.join(kinds)}"
        )
    names = {axis.name for axis in axes}
    return [group for group in structure.groups if names.intersection(group.names)]


def _per_kind(argument: str, value: PerKind, axis: Axis) -> int:
    number = value.get(axis.kind, 1) if isinstance(value, Mapping) else value
    least = 0 if argument == "min_units" else 1
    if type(number) is not int or number < least:
        raise InvalidInput(f"plan: {argument} must be a whole number >= {least}, got {number!r}")
    return number


def _step(round_to: PerKind, axis: Axis) -> int:
    return _per_kind("round_to", round_to, axis)


def _uniform(structure: Structure, ladders: Sequence[_Ladder], budget: Budget) -> list[int]:
    """The largest common share that meets the budget, then single kinds step up while they fit."""
    if budget.keep is not None:
        return [ladder.at_share(budget.keep.get(ladder.axis.kind, 1.0)) for ladder in ladders]
    fits, _ = _fitting(structure, ladders, budget)
    # the shares at which any axis changes its count, from the smallest plan up
    shares = sorted(
        {0.0, 1.0}
        | {
            (a + b) / 2 / ladder.axis.size
            for ladder in ladders
            for a, b in zip(ladder.rungs, ladder.rungs[1:], strict=False)
        }
    )
    counts = [ladder.rungs[-1] for ladder in ladders]
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        candidate = [ladder.at_share(shares[middle]) for ladder in ladders]
        if fits(candidate):
            counts, low = candidate, middle + 1
        else:
            high = middle
    for kind in dict.fromkeys(ladder.axis.kind for ladder in reversed(ladders)):
        while (more := _one_rung_up(ladders, counts, kind)) != counts and fits(more):
            counts = more
    return counts


def _one_rung_up(ladders: Sequence[_Ladder], counts: list[int], kind: str) -> list[int]:
    return [
        min((n for n in ladder.rungs if n > count), default=count)
        if ladder.axis.kind == kind
        else count
        for ladder, count in zip(ladders, counts, strict=True)
    ]


def _global(
    structure: Structure,
    ladders: Sequence[_Ladder],
    values: Mapping[str, np.ndarray],
    budget: Budget,
) -> list[int]:
    """Drop the lowest steps of all axes together until the budget holds, then fill it up."""
    if budget.keep is not None:
        counts = [ladder.axis.size for ladder in ladders]
        for kind, share in budget.keep.items():
            members = [i for i, ladder in enumerate(ladders) if ladder.axis.kind == kind]
            _drop_share(ladders, counts, members, values, share)
        return counts
    fits, cost_of = _fitting(structure, ladders, budget)
    drops = _drops(ladders, values, range(len(ladders)))
    low, high = 0, len(drops)
    while low < high:
        middle = (low + high) // 2
        if fits(_after(ladders, drops[:middle])):
            high = middle
        else:
            low = middle + 1
    counts = _after(ladders, drops[:low])
    limit, blocked = budget.limit(predict_cost(structure)), set[int]()
    for i, rung in reversed(drops[:low].tolist()):
        # a step may come back only after the better ones of its axis
        if i in blocked:
            continue
        more = list(counts)
        more[i] = ladders[i].rungs[rung - 1]
        if cost_of(more) <= limit:
            counts = more
        else:
            blocked.add(i)
            if len(blocked) == len(ladders):
                break
    return counts


def _drops(
    ladders: Sequence[_Ladder], values: Mapping[str, np.ndarray], members: Sequence[int] | range
) -> np.ndarray:
    """Steps down the ladders in the order they are taken, (steps, 2): axis, rung reached."""
    heights, steps = [np.empty(0)], [np.empty((0, 2), dtype=np.int64)]
    for i in members:
        ladder = ladders[i]
        means = _means(values[ladder.axis.name][ladder.order], ladder.rungs)
        # a normalisation may break the order within an axis: a step waits for those below it
        heights.append(np.maximum.accumulate(means))
        rungs = np.arange(1, len(ladder.rungs))
        steps.append(np.stack([np.full_like(rungs, i), rungs], axis=1))
    height, step = np.concatenate(heights), np.concatenate(steps)
    # on a tie the last axis goes first, and every axis goes down in order
    return step[np.lexsort((step[:, 1], -step[:, 0], height))]


def _means(ranked: np.ndarray, rungs: Sequence[int]) -> np.ndarray:
    """Mean value of the units that each step takes."""
    if rungs == tuple(range(rungs[0], rungs[-1] - 1, -1)):
        return ranked[: len(rungs) - 1]
    ends = [len(ranked) - rung for rung in rungs]
    return np.array([ranked[a:b].mean() for a, b in pairwise(ends)])


def _after(ladders: Sequence[_Ladder], drops: np.ndarray) -> list[int]:
    """What every axis keeps after some first steps."""
    taken = np.bincount(drops[:, 0], minlength=len(ladders))
    return [ladder.rungs[rung] for ladder, rung in zip(ladders, taken.tolist(), strict=True)]


def _drop_share(
    ladders: Sequence[_Ladder],
    counts: list[int],
    members: list[int],
    values: Mapping[str, np.ndarray],
    share: float,
) -> None:
    """Drop steps of the member axes until no more than the share of their units is left."""
    total = sum(ladders[i].axis.size * len(ladders[i].group.axes) for i in members)
    left, goal = total, round(share * total)
    for i, rung in _drops(ladders, values, members).tolist():
        if left <= goal:
            break
        left -= (counts[i] - ladders[i].rungs[rung]) * len(ladders[i].group.axes)
        counts[i] = ladders[i].rungs[rung]


def _fitting(
    structure: Structure, ladders: Sequence[_Ladder], budget: Budget
) -> tuple[Callable[[list[int]], bool], Callable[[list[int]], int]]:
    """Whether counts meet the budget, and what they cost; refuses a budget nothing can meet."""
    cost_of = _cost_of_counts(structure, ladders, budget.measure)
    full = predict_cost(structure)
    limit = budget.limit(full)
    smallest = cost_of([ladder.rungs[-1] for ladder in ladders])
    if smallest > limit:
        whole = getattr(full, budget.measure)
        raise InfeasibleBudget(
            f"plan: budget must allow at least {smallest:,} {budget.measure} "
            f"({smallest / whole:.3f} of the model), the smallest plan with these scores, "
            f"min_units and round_to, got {limit:,} ({limit / whole:.3f})"
        )
    return lambda counts: cost_of(counts) <= limit, cost_of


def _cost_of_counts(
    structure: Structure, ladders: Sequence[_Ladder], measure: str
) -> Callable[[list[int]], int]:
    """Cost as a function of kept counts alone.

    Which units an axis keeps does not change the cost, except where their number reaches zero.
    """

    def cost_of(counts: Sequence[int]) -> int:
        named = zip(ladders, counts, strict=True)
        kept = {name: count for ladder, count in named for name in ladder.group.names}
        return getattr(Reading.of_counts(structure, kept), measure)

    return cost_of


def _normalised(
    structure: Structure,
    raw: dict[str, np.ndarray],
    groups: Sequence[Group],
    normalization: str,
    latency_saved: Mapping[str, float] | None,
    latency_weight: float,
) -> dict[str, np.ndarray]:
    if normalization == "none":
        return raw
    if normalization == "isomorphic":
        return _share_ranks([group.first for group in groups], raw)
    if normalization == "per_mac":
        saved = {group.first.name: macs_per_unit(structure, group) for group in groups}
        return {name: value / saved[name] for name, value in raw.items()}
    if normalization == "mean_per_group":
        return {name: value / (value.mean() or 1.0) for name, value in raw.items()}
    if normalization == "lamp":
        return {name: _lamp(value) for name, value in raw.items()}
    unit = {name: value / (np.linalg.norm(value) or 1.0) for name, value in raw.items()}
    if normalization == "l2_per_layer":
        return unit
    names = {group.first.name: group.names for group in groups}
    if latency_saved is None or {*chain(*names.values())} - latency_saved.keys():
        raise InvalidInput(
            "plan: latency_saved must give the seconds one unit of every scored axis saves for the "
            f"normalization 'latency', got {'none' if latency_saved is None else 'fewer axes'}"
        )
    saved = {name: sum(latency_saved[each] for each in names[name]) for name in unit}
    return {name: value - latency_weight * saved[name] for name, value in unit.items()}


def _share_ranks(axes: Sequence[Axis], raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each unit's rank among all units of its kind, as a share."""
    values: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(axis.kind for axis in axes):
        names = [axis.name for axis in axes if axis.kind == kind]
        unit = [raw[name] / (np.linalg.norm(raw[name]) or 1.0) for name in names]
        together = np.concatenate(unit)
        ranks = np.empty(len(together))
        ranks[np.argsort(together, kind="stable")] = np.arange(len(together)) / len(together)
        stops = np.cumsum([len(u) for u in unit])[:-1]
        values |= zip(names, np.split(ranks, stops), strict=True)
    return values


def _lamp(value: np.ndarray) -> np.ndarray:
    squares = value**2
    order = np.argsort(squares, kind="stable")
    at_least = np.cumsum(squares[order][::-1])[::-1]
    result = np.empty_like(squares)
    result[order] = squares[order] / np.where(at_least > 0, at_least, 1.0)
    return result


def macs_per_unit(structure: Structure, group: Group) -> float:
    """Multiply-accumulates that one unit of axes that keep the same ones accounts for."""
    without = Reading.of_counts(structure, dict.fromkeys(group.names, group.first.size - 1))
    return float(max(Reading.of_counts(structure, {}).macs - without.macs, 1))
