"""From gates to a smaller model: which units a set of gates keeps, and where its values go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bare import bare
from ..errors import InvalidInput
from ..planning import Plan, plan
from ..planning.budget import Budget
from ..scoring.scores import Scores
from ..structure import Axis, Structure, describe
from ..surgery import fold_gates
from . import hooks, kinds
from .module import GATED_UNITS, Gates


@torch.no_grad()
def to_plan(
    model: nn.Module | Structure,
    gates: Gates,
    budget: Budget | float | Mapping[str, Any] | None = None,
    *,
    threshold: float = 0.0,
    min_units: int = 1,
    **options: Any,
) -> Plan:
    """The plan that a set of gates asks for.

    Without a budget the units stay whose gate is above ``threshold`` in magnitude: for ``ste`` and
    ``hard_concrete`` the gates settle it. With one the units are ranked by their gates (by the
    scores behind them for ``ste`` and ``hard_concrete``), all axes together as they are, and the
    lowest go until the budget is met. With learned thresholds that rank is by how much lower the
    threshold of its axis would have to be for a unit to go, so that all thresholds move together
    until the budget is met. Of axes that share tied parameters a unit stays where any of
    their gates keeps it.

    Args:
        model: the model the gates belong to, or its Structure.
        gates: as trained; they may be attached still.
        budget: as for :func:`vitprune_fast.plan`, by which all heads of a layer then keep the same
            number of dims.
        threshold: units at or below it go, for no budget.
        min_units: at least so many units stay in every axis, the best ones; 0 lets all heads of a
            block go. Of dims it is so many in every head.
        options: of :func:`vitprune_fast.plan`, for a budget; ``normalization`` is ``"none"`` here
            if not given.

    Returns:
        A Plan for ``model``.

    Raises:
        InvalidInput: gates that are NaN or Inf, of another model, or an argument out of range.
        InfeasibleBudget: the smallest plan allowed costs more than the budget.
    """
    for name in gates.axes:
        if not gates.score(name).isfinite().all():
            raise InvalidInput(f"gates.to_plan: gates must be finite, got NaN or Inf in {name!r}")
    if budget is None:
        if options:
            raise InvalidInput(
                f"gates.to_plan: {next(iter(options))} must come with a budget, got none"
            )
        known = isinstance(model, Structure)
        structure = model if known else describe(bare("gates.to_plan", model))
        return _above(gates, threshold, min_units).check(structure)
    ranked = {name: _ranking(gates, name).float().cpu() for name in gates.axes}
    scores = Scores(ranked, "gates", "mean", 0)
    options = {"normalization": "none", "units": gates.units, **options}
    return plan(model, scores, budget, min_units=min_units, **options)


def _above(gates: Gates, threshold: float, min_units: int) -> Plan:
    if not 0 <= threshold < float("inf"):
        raise InvalidInput(f"gates.to_plan: threshold must be a number >= 0, got {threshold!r}")
    if type(min_units) is not int or min_units < 0:
        raise InvalidInput(
            f"gates.to_plan: min_units must be a whole number >= 0, got {min_units!r}"
        )
    stay, values = {}, gates.values()
    for name, axis in gates.axes.items():
        stays = values[name].abs() > threshold
        if min_units:
            stays = stays | _best(_ranking(gates, name), axis, min_units)
        stay[name] = stays
    for group in gates.structure.groups:
        gated = [stay[name] for name in group.names if name in stay]
        stay |= {name: torch.stack(gated).any(0) for name in group.names if gated}
    return Plan.of(gates.structure, {n: s.nonzero().flatten().tolist() for n, s in stay.items()})


def _ranking(gates: Gates, axis: str) -> Tensor:
    score = gates.score(axis).detach()
    if gates.thresholds:
        return kinds.headroom(score, gates.threshold(axis).detach())
    return score if gates.kind in ("ste", "hard_concrete") else score.abs()


def _best(ranking: Tensor, axis: Axis, count: int) -> Tensor:
    """Boolean (units,): the best ones of the axis, or of every parent unit; ties to lower ones."""
    rows = ranking.view(-1, axis.width)
    order = rows.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).flatten()


@torch.inference_mode(False)
def fold(model: nn.Module, gates: Gates) -> None:
    """Write the gate values into the weights of ``model``, in place, and take the gates out.

    The model then computes without gates what it computed with them in evaluation: see
    :func:`vitprune_fast.fold_gates`. Do it before :func:`vitprune_fast.prune`, which cuts units
    and does not scale those that stay.

    Args:
        model: the model the gates belong to; they may be attached or not.
        gates: as trained.

    Raises:
        InvalidInput: gates of another model, of which one is NaN or Inf, or other gates are
            attached; nothing was changed then.
    """
    model = bare("gates.fold", model)
    attached = hooks.gates_on(model)
    if attached is not None and attached is not gates:
        raise InvalidInput("gates.fold: model must have these gates or none, got others attached")
    with torch.no_grad():
        fold_gates(model, {name: value.detach() for name, value in gates.values().items()})
    if attached is not None:
        gates.detach(model)


@torch.inference_mode(False)
def silence(model: nn.Module, plan: Plan) -> None:
    """Write into the weights, in place, that units which a plan leaves out contribute nothing.

    The model then computes what it does behind the plan (:func:`vitprune_fast.mask`), but for units
    that no gate can close (embedding channels, branches and blocks), which stay as they are, and
    for norms over units (``qk_norm``), whose statistics these still enter.

    Args:
        model: that the plan was made for.
        plan: says which units stay.
    """
    model = bare("gates.silence", model)
    values = {}
    for axis in (axis for kind in GATED_UNITS for axis in describe(model).units(kind)):
        if len(plan[axis.name]) < axis.size:
            values[axis.name] = torch.zeros(axis.size)
            values[axis.name][plan[axis.name]] = 1.0
    fold_gates(model, values)
