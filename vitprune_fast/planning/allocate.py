"""Spread a budget over the axes: how many units each keeps, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from ..errors import InvalidInput
from ..registry import named, names
from ..scoring.scores import Scores
from ..structure import Axis, Group, Structure, describe
from .budget import Budget
from .normalization import NORMALIZATIONS, Normalization, normalised
from .plan import Plan
from .problem import Problem, ladder

FOLDER = "planning/allocations"
# kinds whose saving depends on how many units go, and not on which
PLANNED_KINDS = ("head", "neuron", "embed")
PerKind = int | Mapping[str, int]
# of 16 bits they are 16 bytes, of which the matrix products of GPUs want rows to be multiples
_ALIGNED_UNITS = 8
_ALIGNED_KINDS = ("neuron", "embed")
# in smaller axes the steps would be too coarse
_ALIGNED_ABOVE = 256


def plan(
    model: nn.Module | Structure,
    scores: Scores,
    budget: Budget,
    allocation: str = "global",
    normalization: Normalization | None = None,
    min_units: PerKind = 1,
    round_to: PerKind | None = None,
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
        allocation: ``"global"``, ``"uniform"`` or another of ``planning/allocations``.
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
        round_to: kept counts are multiples of this, or by kind ``{"neuron": 64}``; an axis with
            fewer units than that is kept whole. Default: 8 for neurons and embedding channels of an
            axis of more than 256 whose size is a multiple of 8, as GPUs want in 16 bits
            (docs/adr/0015-counts-that-gpus-want.md); otherwise 1.
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
    try:
        allocate = named(FOLDER, allocation, "allocate")
    except KeyError:
        raise InvalidInput(
            f"plan: allocation must be one of {', '.join(names(FOLDER))}, got {allocation!r}"
        ) from None
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
        ladder(
            group,
            raw[axis.name],
            _per_kind("min_units", min_units, axis, 1),
            _per_kind("round_to", {} if round_to is None else round_to, axis, _aligned(axis)),
        )
        for group, axis in zip(groups, axes, strict=True)
    ]
    if budget.measure == "keep":
        assert budget.keep is not None
        if unscored := budget.keep.keys() - {axis.kind for axis in axes}:
            raise InvalidInput(
                f"plan: scores must cover the unit kinds of the budget, got none for "
                f"{sorted(unscored)[0]!r}"
            )
    values = normalised(structure, raw, groups, normalization, latency_saved, latency_weight)
    counts = allocate(Problem(structure, ladders, values, budget))
    return Plan.of(
        structure,
        {
            name: rungs.keep(count)
            for rungs, count in zip(ladders, counts, strict=True)
            for name in rungs.group.names
        },
    )


def _ranking(scores: Scores, group: Group) -> np.ndarray:
    """What ranks the units of axes that keep the same ones."""
    rankings = [scores.ranking(name).numpy() for name in group.names if name in scores]
    return np.sum(rankings, axis=0)


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


def _aligned(axis: Axis) -> int:
    is_large = axis.kind in _ALIGNED_KINDS and axis.size > _ALIGNED_ABOVE
    return _ALIGNED_UNITS if is_large and axis.size % _ALIGNED_UNITS == 0 else 1


def _per_kind(argument: str, value: PerKind, axis: Axis, default: int) -> int:
    if isinstance(value, Mapping) and (unknown := value.keys() - {*PLANNED_KINDS}):
        raise InvalidInput(
            f"plan: {argument} must name kinds among {', '.join(PLANNED_KINDS)}, "
            f"got {min(unknown)!r}"
        )
    number = value.get(axis.kind, default) if isinstance(value, Mapping) else value
    least = 0 if argument == "min_units" else 1
    if type(number) is not int or number < least:
        raise InvalidInput(f"plan: {argument} must be a whole number >= {least}, got {number!r}")
    return number
