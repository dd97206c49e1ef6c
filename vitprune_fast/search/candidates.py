"""From counts of units to a plan, its cost, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import InvalidInput
from ..planning import Budget, Cost, Plan, plan, predict_cost
from ..planning.allocate import possible_shares
from ..planning.constraints import Constraints
from ..scoring.scores import Scores
from ..structure import Axis, Structure
from .candidate import Candidate, Evaluate
from .evaluations import Evaluations, other_images
from .strategies import Counts, Spent

OnEvent = Callable[[dict[str, Any]], None]


class SearchStopped(Exception):
    """A search was asked to stop and did; the same call goes on from its checkpoint."""


class Candidates:
    """The candidates of a search, each evaluated once.

    Args:
        structure: of the model.
        scores: which units stay of a count.
        units: the kinds that are searched.
        plan_options: of ``plan``, besides budget and units.
        evaluations: what was measured already, and will be.
        evaluate_all: measures a candidate on all images.
        most: evaluations that may be made, not counting those of the unpruned model and of checks.
        on_event: told every candidate.
        rescore: gives scores of the model as it is cut by a plan; None keeps those there are.
        stop: asked after every candidate; True ends the search.

    Attributes:
        units: kind -> how many units it has in axes with scores.
        smallest: multiply-accumulates of the smallest candidate.
        evaluate: measures a candidate; ``evaluate_all`` unless another one is set.
        table: all candidates in order.

    Raises:
        InvalidInput: what ``plan`` refuses, or a kind has no scores.
    """

    def __init__(
        self,
        structure: Structure,
        scores: Scores,
        units: tuple[str, ...],
        plan_options: Mapping[str, Any],
        evaluations: Evaluations,
        evaluate_all: Evaluate,
        most: int,
        on_event: OnEvent | None = None,
        rescore: Callable[[Plan], Scores] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self._structure, self._scores = structure, scores
        self._axes = _axes_by_kind(structure, scores, units)
        self._options = {**plan_options, "units": units}
        self.units = {kind: sum(a.size for a in axes) for kind, axes in self._axes.items()}
        self._evaluations, self._evaluate_all = evaluations, evaluate_all
        self.evaluate = evaluate_all
        self._most, self._spent = most, 0
        self._on_event, self._rescore, self._stop = on_event, rescore, stop
        self._cut_to: Plan | None = None
        self._is_rescored = True
        self._plans: dict[tuple[int, ...], tuple[Plan, Cost]] = {}
        self._seen: dict[str, str] = {}
        self._found: dict[tuple[str, Plan], Candidate] = {}
        self.table: list[Candidate] = []
        # what bounds and minima leave room for, since a plan of another share would be refused
        self._shares = possible_shares(structure, scores, Constraints.among(self._options))
        # found out before the first evaluation: what plan refuses, and the smallest candidate
        self.smallest = self.macs(dict.fromkeys(self.units, 0))

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self._most - self._spent

    def macs(self, counts: Counts) -> int:
        """Multiply-accumulates of a candidate."""
        return self._planned(counts)[1].macs

    def measure(self, counts: Counts, step: str, needed: float | None = None) -> Candidate:
        """See ``strategies.Trials``."""
        made, cost = self._planned(counts)
        return self._measured(made, cost, step, needed, self.evaluate)

    def unpruned(self) -> Candidate:
        """The model as it is, whatever bounds there are."""
        whole, cost = Plan.of(self._structure), predict_cost(self._structure)
        return self._measured(whole, cost, "unpruned", None, self.evaluate)

    def planned(self, counts: Counts) -> Plan:
        """Which units stay of such counts; costs no evaluation."""
        return self._planned(counts)[0]

    def check(self, plan: Plan, step: str, needed: float | None = None) -> Candidate:
        """A plan, evaluated on all images; there is always an evaluation left for that."""
        cost = predict_cost(self._structure, plan)
        return self._measured(plan, cost, step, needed, self._evaluate_all)

    def commit(self, candidate: Candidate) -> None:
        """Later candidates are cut further than this one, by the scores of what is left of it."""
        self._cut_to = candidate.plan
        if self._rescore is not None:
            self._is_rescored = False
            self._plans.clear()

    def _planned(self, counts: Counts) -> tuple[Plan, Cost]:
        key = tuple(counts[kind] for kind in self.units)
        if key not in self._plans:
            if not self._is_rescored:
                assert self._rescore is not None and self._cut_to is not None
                self._scores = _after_cut(self._rescore(self._cut_to), self._cut_to)
                self._is_rescored = True
            shares = {
                kind: self._possible(kind, counts[kind] / units)
                for kind, units in self.units.items()
            }
            made = plan(self._structure, self._scores, Budget(keep=shares), **self._options)
            if self._rescore is not None and self._cut_to is not None:
                made = _both(self._structure, made, self._cut_to)
            self._plans[key] = made, predict_cost(self._structure, made)
        return self._plans[key]

    def _possible(self, kind: str, share: float) -> float:
        """The share nearest to another one that a plan may keep."""
        least, most = self._shares.get(kind, (0.0, 1.0))
        return min(max(share, least), most)

    def _measured(
        self, plan: Plan, cost: Cost, step: str, needed: float | None, evaluate: Evaluate
    ) -> Candidate:
        which = "all" if evaluate is self._evaluate_all else "some"
        if (which, plan) not in self._found:
            if evaluate is self.evaluate and not plan.keeps_everything:
                if not self.left:
                    raise Spent
                self._spent += 1
            measured = self._evaluations.measure(plan, evaluate, which)
            if self._seen.setdefault(which, measured.seen) != measured.seen:
                raise other_images()
            kept = {k: sum(len(plan[a.name]) for a in axes) for k, axes in self._axes.items()}
            feasible = needed is None or measured.top1 >= needed
            sign = ">=" if feasible else "<"
            candidate = Candidate(
                step,
                {kind: (units - kept[kind]) / units for kind, units in self.units.items()},
                kept,
                cost.macs,
                cost.params,
                measured.top1,
                measured.loss,
                measured.images,
                feasible,
                "" if needed is None else f"top-1 {measured.top1:.4f} {sign} {needed:.4f}",
                plan,
            )
            self._found[which, plan] = candidate
            self.table.append(candidate)
            if self._on_event is not None:
                self._on_event(
                    {
                        "event": "search",
                        "step": len(self.table),
                        # the unpruned model and checks are not among the most
                        "steps": self._most + len(self.table) - self._spent,
                        "candidate": step,
                        "share": cost.macs / self.table[0].macs,
                        "top1": measured.top1,
                    }
                )
            if self._stop is not None and self._stop():
                raise SearchStopped
        return self._found[which, plan]


def _axes_by_kind(
    structure: Structure, scores: Scores, units: tuple[str, ...]
) -> dict[str, list[Axis]]:
    """Kind -> the axes whose units have scores, or share them with those that do."""
    groups = [g for g in structure.groups if any(name in scores for name in g.names)]
    found = {k: [a for g in groups if g.first.kind == k for a in g.axes] for k in units}
    if foreign := [name for name in scores if name not in structure.axes]:
        raise InvalidInput(
            f"search: scores must belong to this model, got some of {foreign[0]!r}, which it does "
            "not have"
        )
    if unscored := [kind for kind, axes in found.items() if not axes]:
        raise InvalidInput(
            f"search: scores must cover the unit kinds {', '.join(units)}, got none of "
            f"{unscored[0]!r}; score them too, or leave the kind out of units"
        )
    return found


def _after_cut(scores: Scores, cut_to: Plan) -> Scores:
    """Scores by which the units that have gone already are the first to go."""
    values = {}
    for name in scores:
        ranking = scores.ranking(name).clone()
        gone = sorted({*range(len(ranking))} - {*cut_to.get(name, ())})
        lowest, largest = float(ranking.min()), float(ranking.abs().max())
        # below all others, and small beside them in the norms that make axes comparable
        ranking[gone] = lowest - 1e-3 * (largest or 1.0)
        values[name] = ranking
    reduction = "abs" if scores.reduction == "signed" else scores.reduction
    return replace(scores, by_axis=values, reduction=reduction)


def _both(structure: Structure, one: Plan, other: Plan) -> Plan:
    """A plan that keeps what both keep."""
    kept = {name: sorted({*one[name]} & {*other[name]}) for name in structure.axes}
    return Plan.of(structure, kept, one.removed | other.removed)
