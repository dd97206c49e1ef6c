"""Spread a budget over the axes: how many units each keeps, and which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ..bare import bare
from ..errors import InfeasibleBudget, InvalidInput
from ..registry import named, names
from ..scoring.scores import Scores
from ..structure import DEPTH_KINDS, Group, Structure, describe
from .budget import Budget
from .constraints import Bounds, Constraints, PerKind, has_stages
from .cost import predict_cost
from .normalization import NORMALIZATIONS, Normalization, normalised
from .plan import Plan
from .problem import Ladder, Problem

FOLDER = "planning/allocations"


def plan(
    model: nn.Module | Structure,
    scores: Scores,
    budget: Budget | float | Mapping[str, Any],
    allocation: str = "global",
    normalization: Normalization | None = None,
    min_units: PerKind = 1,
    round_to: PerKind | None = None,
    units: Sequence[str] = ("head", "neuron"),
    latency_saved: Mapping[str, float] | None = None,
    latency_weight: float = 1.0,
    *,
    bounds: Bounds | None = None,
    protect: Sequence[str] = (),
    include: Sequence[str] | None = None,
    keep_ends: bool = True,
) -> Plan:
    """Choose the units to keep.

    Axes whose parameters are tied keep the same units, ranked by the sum of their scores. All heads
    of a layer keep the same number of q/k dims, each its own best ones, and so for v dims: the
    layer is as wide as its widest head. Of a model with stages every stage keeps a block.

    ``uniform`` keeps the same share of every axis of a kind and drops the lowest scores of each.
    ``global`` ranks units of all axes together after normalisation and drops the lowest until the
    budget is met, then takes back the best ones that still fit. Ties go to the lower axis and unit
    number; nothing random is drawn.

    Args:
        model: the model the scores belong to, or its Structure.
        scores: which units count; only axes with scores are cut.
        budget: multiply-accumulates, parameters or both, and shares of units to keep by kind: a
            :class:`Budget`, its fields as a mapping, or a share of the multiply-accumulates
            (``0.5``). Kinds with a share keep that; the others meet the rest.
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
        min_units: at least so many units stay in every axis whose branch stays, or by kind
            ``{"head": 0}``; of dims, in every head. One channel stays always.
        round_to: kept counts are multiples of this (not those of branches and blocks), or by kind
            ``{"neuron": 64}``; an axis with fewer units than that is kept whole. Default: 8 for
            neurons and embedding channels of an axis of more than 256, and for dims of heads of
            more than 31, where the size is a multiple of 8, as GPUs want in 16 bits
            (docs/adr/0015-counts-that-gpus-want.md); otherwise 1.
        units: unit kinds to cut; the scores may hold others, whose units all stay.
        latency_saved: axis name -> seconds saved by one unit of it, for ``latency``.
        latency_weight: score per second, for ``latency``.
        bounds: unit kind, or pattern of axis names such as ``"blocks.0.*"`` -> (least, most) that
            every such axis keeps while its branch stays, as shares (``0.25``) or in units (``64``;
            of dims, in every head); None is no bound. Where several hold, the narrowest does.
        protect: patterns of axes, branches and blocks that stay whole, with all that is in them
            (``"blocks.0.attn"``); a branch or a block that holds such an axis stays, too.
        include: patterns of the only ones that may go or lose units; None is all.
        keep_ends: the first and the last block stay, with both branches; they may lose units.

    Returns:
        A Plan. The cost predicted for it is exactly that of the pruned model, and at most the
        budget, in every measure. ``global`` misses it by less than one step of an axis
        (``round_to`` units), unless all steps left are larger; ``uniform`` by less than one step
        of all axes of a kind. Of two budgets in one measure the larger one never costs less.

    Raises:
        InfeasibleBudget: even the smallest plan allowed costs more, or keeps more; the message
            names that, and the constraint without which it would be smallest.
        InvalidInput: an argument has a value that cannot be used, constraints contradict each
            other, a pattern matches nothing, or the scores belong to another model or are not
            finite.
    """
    structure = model if isinstance(model, Structure) else describe(bare("plan", model))
    budget = Budget.of(budget)
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
    constraints = Constraints(
        tuple(units) if not isinstance(units, str) else units,
        min_units,
        round_to,
        {} if bounds is None else bounds,
        () if protect is None else protect,
        include,
        keep_ends,
    )
    rankings = _rankings(structure, scores, constraints)
    ladders = constraints.ladders(structure, rankings)
    if unscored := (budget.keep or {}).keys() - {ladder.axis.kind for ladder in ladders}:
        kind = min(unscored)
        if kind not in constraints.units:
            raise InvalidInput(
                "plan: units must hold the kinds of the budget, got "
                f"{', '.join(constraints.units)} without {kind!r}; name it there too, and score it"
            )
        raise InvalidInput(
            f"plan: scores must cover the unit kinds of the budget, got none of {kind!r} that may "
            "go"
        )
    values = normalised(structure, ladders, normalization, latency_saved, latency_weight)
    counts = [ladder.rungs[0] for ladder in ladders]
    if budget.keep is not None:
        _check_shares(structure, ladders, budget.keep, constraints, rankings)
        counts = allocate(Problem(structure, ladders, values, {}, budget.keep))
        # what has a share of its own is settled
        ladders = [
            replace(ladder, rungs=(count,)) if ladder.axis.kind in budget.keep else ladder
            for ladder, count in zip(ladders, counts, strict=True)
        ]
    if budget.measures:
        limits = budget.limits(predict_cost(structure))
        problem = Problem(structure, ladders, values, limits)
        if not problem.fits(problem.smallest):
            raise _infeasible(problem, constraints, rankings, budget.keep or {})
        counts = allocate(problem)
    return Plan.of(
        structure,
        {
            name: ladder.keep(count)
            for ladder, count in zip(ladders, counts, strict=True)
            for name in ladder.group.names
        },
    )


def possible_shares(
    structure: Structure, scores: Scores, constraints: Constraints
) -> dict[str, tuple[float, float]]:
    """Unit kind -> the least and the largest share of its units that a plan may keep.

    Args:
        structure: of the model.
        scores: as for ``plan``.
        constraints: as the arguments of ``plan`` say them.
    """
    found: dict[str, list[Ladder]] = {}
    for ladder in constraints.ladders(structure, _rankings(structure, scores, constraints)):
        found.setdefault(ladder.axis.kind, []).append(ladder)
    totals = {kind: sum(each.width * each.breadth for each in of) for kind, of in found.items()}
    return {
        kind: (_ends(of)[0] / totals[kind], _ends(of)[1] / totals[kind])
        for kind, of in found.items()
    }


def _rankings(
    structure: Structure, scores: Scores, constraints: Constraints
) -> dict[str, np.ndarray]:
    """What ranks the units of every scored group, by the name of its first axis."""
    scores.check_of("plan", structure)
    for name, value in scores.items():
        if not value.isfinite().all():
            raise InvalidInput(f"plan: scores must be finite, got NaN or Inf in {name!r}")
    if not len(scores):
        raise InvalidInput("plan: scores must cover at least one axis, got none")
    kinds = {structure.axes[name].kind for name in scores}
    if kinds.isdisjoint(constraints.units):
        raise InvalidInput(
            f"plan: scores must cover a unit kind of {', '.join(constraints.units)}, "
            f"got {', '.join(sorted(kinds))}"
        )
    scored = [group for group in structure.groups if any(name in scores for name in group.names)]
    return {group.first.name: _ranking(scores, group) for group in scored}


def _ranking(scores: Scores, group: Group) -> np.ndarray:
    """What ranks the units of axes that keep the same ones."""
    rankings = [scores.ranking(name).numpy() for name in group.names if name in scores]
    return np.sum(rankings, axis=0)


def _check_shares(
    structure: Structure,
    ladders: Sequence[Ladder],
    keep: Mapping[str, float],
    constraints: Constraints,
    rankings: Mapping[str, np.ndarray],
) -> None:
    """Refuses shares that what the caller said besides leaves no room for.

    That an axis keeps a unit, or as many as a step has, is no contradiction to a small share.
    """
    usual = Constraints(constraints.units, round_to=constraints.round_to, keep_ends=False)
    for kind, share in keep.items():
        of_kind = {each.axis.name: each for each in ladders if each.axis.kind == kind}
        fewest, most = _ends(of_kind.values())
        total = sum(each.width * each.breadth for each in of_kind.values())

        def least(lax: Constraints, names: Collection[str] = of_kind) -> int:
            freed = lax.ladders(structure, rankings)
            return _ends(each for each in freed if each.axis.name in names)[0]

        goal = round(share * total)
        is_refused = kind in DEPTH_KINDS or least(usual) < fewest
        if most < goal or (fewest > goal and is_refused):
            raise InfeasibleBudget(
                f"plan: budget must keep a share of {kind!r} from {fewest / total:.3f} to "
                f"{most / total:.3f} ({fewest:,} to {most:,} units), got {share:g}; "
                f"{_binding(structure, constraints, least)}"
            )


def _ends(ladders: Iterable[Ladder]) -> tuple[int, int]:
    """The fewest and the most units that ladders may keep together."""
    ends = [(each.rungs[-1] * each.breadth, each.rungs[0] * each.breadth) for each in ladders]
    return sum(fewest for fewest, _ in ends), sum(most for _, most in ends)


def _infeasible(
    problem: Problem,
    constraints: Constraints,
    rankings: Mapping[str, np.ndarray],
    keep: Mapping[str, float],
) -> InfeasibleBudget:
    """Names the smallest plan there is, and what stands in the way of smaller ones."""
    structure, whole = problem.structure, predict_cost(problem.structure)
    smallest = problem.costs(problem.smallest)
    measure = max(smallest, key=lambda name: smallest[name] / problem.limits[name])
    kept = {each.axis.name: each for each in problem.ladders if each.axis.kind in keep}

    def least(lax: Constraints, settled: Mapping[str, Ladder] = kept) -> int:
        freed = lax.ladders(structure, rankings)
        free = replace(problem, ladders=[settled.get(each.axis.name, each) for each in freed])
        return free.costs(free.smallest)[measure]

    def shown(cost: int) -> str:
        return f"{cost:,} {measure} ({cost / getattr(whole, measure):.3f} of the model)"

    limit = problem.limits[measure]
    percent = f"; {limit} % is written {limit / 100:g}" if limit <= 100 else ""
    without_keep = {"keep": least(constraints, {})} if keep else {}
    return InfeasibleBudget(
        f"plan: budget must allow at least {shown(smallest[measure])}, the smallest plan, got "
        f"{shown(limit)}{percent}; {_binding(structure, constraints, least, without_keep)}"
    )


def _binding(
    structure: Structure,
    constraints: Constraints,
    least: Callable[[Constraints], int],
    others: Mapping[str, int] | None = None,
) -> str:
    """Which constraint stands most in the way, by what would be the least without it."""
    without = {name: least(lax) for name, lax in constraints.relaxed()} | {**(others or {})}
    name = min(without, key=without.__getitem__)
    if without[name] < least(constraints):
        return f"what binds most is {name}, without which the least would be {without[name]:,}"
    by_stages = has_stages(structure) and not {*DEPTH_KINDS}.isdisjoint(constraints.units)
    also = ", and every stage keeps a block" if by_stages else ""
    return f"no constraint alone stands in the way{also}; score and cut more unit kinds"
