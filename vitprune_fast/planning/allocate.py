"""Spread a budget over the axes: how many units each keeps, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
from torch import nn

from ..errors import InfeasibleBudget, InvalidInput
from ..scoring.scores import Scores
from ..structure import Axis, Structure, describe
from .budget import Budget
from .cost import Cost, predict_cost
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
    groups = _scored_axes(structure, scores, units)
    axes = [group[0] for group in groups]
    raw = {group[0].name: _ranking(scores, group) for group in groups}
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
    units_kept = [ladder.keep(n) for ladder, n in zip(ladders, counts, strict=True)]
    return Plan.of(structure, _kept(ladders, units_kept))


@dataclass(frozen=True)
class _Ladder:
    """The counts an axis may keep, falling, and the order its units go in."""

    axis: Axis
    # of this axis, and of those whose parameters are tied to its own
    names: tuple[str, ...]
    # unit numbers, least important first
    order: np.ndarray
    # allowed numbers of kept units, from all of them down to the minimum
    rungs: tuple[int, ...]

    def keep(self, count: int) -> list[int]:
        """The ``count`` best units, sorted by number."""
        return sorted(self.order[len(self.order) - count :].tolist())

    def at_share(self, share: float) -> int:
        """The allowed count nearest to a share of the axis, the larger one on a tie."""
        return min(self.rungs, key=lambda n: (abs(n - share * self.axis.size), -n))


def _ranking(scores: Scores, group: Sequence[Axis]) -> np.ndarray:
    """What ranks the units of axes that keep the same ones."""
    rankings = [scores.ranking(axis.name).numpy() for axis in group if axis.name in scores]
    return np.sum(rankings, axis=0)


def _ladder(group: Sequence[Axis], raw: Mapping[str, np.ndarray], least: int, step: int) -> _Ladder:
    axis = group[0]
    ranking = raw[axis.name]
    # a stable sort, and among equals the highest number goes first, so the lowest ones stay
    order = np.argsort(ranking[::-1], kind="stable")
    order = axis.size - 1 - order
    least = min(axis.size, math.ceil(least / step) * step)
    below = range(axis.size // step * step, -1, -step)
    rungs = (axis.size, *(n for n in below if least <= n < axis.size))
    return _Ladder(axis, tuple(each.name for each in group), order, rungs)


def _kept(ladders: Sequence[_Ladder], units: Sequence[Sequence[int]]) -> dict[str, Sequence[int]]:
    """The units every axis keeps, tied axes included."""
    return {name: own for ladder, own in zip(ladders, units, strict=True) for name in ladder.names}


def _scored_axes(
    structure: Structure, scores: Scores, units: Sequence[str]
) -> list[tuple[Axis, ...]]:
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
    groups = {axis.name: group for group in structure.twins() for axis in group}
    # a dict, since the axes of a group all lead to it
    return list(dict.fromkeys(groups.get(axis.name, (axis,)) for axis in axes))


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
    slack = budget.limit(predict_cost(structure)) - cost_of(counts)
    blocked: set[int] = set()
    for i, rung in reversed(drops[:low]):
        # a step may come back only after the better ones of its axis
        if i in blocked:
            continue
        more = list(counts)
        more[i] = ladders[i].rungs[rung - 1]
        gain = cost_of(more) - cost_of(counts)
        if gain <= slack:
            counts, slack = more, slack - gain
        else:
            blocked.add(i)
            if len(blocked) == len(ladders):
                break
    return counts


def _drops(
    ladders: Sequence[_Ladder], values: Mapping[str, np.ndarray], members: Sequence[int] | range
) -> list[tuple[int, int]]:
    """Steps down the ladders (axis, rung reached) in the order they are taken."""
    steps = []
    for i in members:
        ladder = ladders[i]
        ranked = values[ladder.axis.name][ladder.order]
        highest = -math.inf
        for rung in range(1, len(ladder.rungs)):
            gone = slice(len(ranked) - ladder.rungs[rung - 1], len(ranked) - ladder.rungs[rung])
            # a normalisation may break the order within an axis: a step waits for those below it
            highest = max(highest, float(ranked[gone].mean()))
            steps.append((highest, -i, rung))
    return [(-i, rung) for _, i, rung in sorted(steps)]


def _after(ladders: Sequence[_Ladder], drops: Sequence[tuple[int, int]]) -> list[int]:
    counts = [ladder.axis.size for ladder in ladders]
    for i, rung in drops:
        counts[i] = ladders[i].rungs[rung]
    return counts


def _drop_share(
    ladders: Sequence[_Ladder],
    counts: list[int],
    members: list[int],
    values: Mapping[str, np.ndarray],
    share: float,
) -> None:
    """Drop steps of the member axes until no more than the share of their units is left."""
    total = sum(ladders[i].axis.size * len(ladders[i].names) for i in members)
    left, goal = total, round(share * total)
    for i, rung in _drops(ladders, values, members):
        if left <= goal:
            break
        left -= (counts[i] - ladders[i].rungs[rung]) * len(ladders[i].names)
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
    cache: dict[tuple[int, ...], int] = {}

    def cost_of(counts: list[int]) -> int:
        key = tuple(counts)
        if key not in cache:
            kept = _kept(ladders, [range(n) for n in counts])
            cache[key] = getattr(predict_cost(structure, Plan.of(structure, kept)), measure)
        return cache[key]

    return cost_of


def _normalised(
    structure: Structure,
    raw: dict[str, np.ndarray],
    groups: Sequence[tuple[Axis, ...]],
    normalization: str,
    latency_saved: Mapping[str, float] | None,
    latency_weight: float,
) -> dict[str, np.ndarray]:
    if normalization == "none":
        return raw
    if normalization == "isomorphic":
        return _share_ranks([group[0] for group in groups], raw)
    if normalization == "per_mac":
        saved = {group[0].name: macs_per_unit(structure, *group) for group in groups}
        return {name: value / saved[name] for name, value in raw.items()}
    if normalization == "mean_per_group":
        return {name: value / (value.mean() or 1.0) for name, value in raw.items()}
    if normalization == "lamp":
        return {name: _lamp(value) for name, value in raw.items()}
    unit = {name: value / (np.linalg.norm(value) or 1.0) for name, value in raw.items()}
    if normalization == "l2_per_layer":
        return unit
    twins = {group[0].name: [axis.name for axis in group] for group in groups}
    if latency_saved is None or {*chain(*twins.values())} - latency_saved.keys():
        raise InvalidInput(
            "plan: latency_saved must give the seconds one unit of every scored axis saves for the "
            f"normalization 'latency', got {'none' if latency_saved is None else 'fewer axes'}"
        )
    saved = {name: sum(latency_saved[twin] for twin in twins[name]) for name in unit}
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


def macs_per_unit(structure: Structure, *axes: Axis) -> float:
    """Multiply-accumulates that one unit of an axis, or of tied axes, accounts for."""
    without = Plan.of(structure, {axis.name: range(1, axis.size) for axis in axes})
    full: Cost = predict_cost(structure)
    return float(max(full.macs - predict_cost(structure, without).macs, 1))
