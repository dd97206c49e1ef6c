"""Random plans, each tried: masked is pruned, the cost is the predicted one, twice is once."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..planning.cost import count_macs, count_macs_by_module, predict_cost
from ..planning.plan import Plan
from ..structure import Axis, Dim, Structure, describe
from ..structure.axes import as_dim
from ..structure.reading import Reading
from .declared import Fault
from .drawn import KINDS, draw_plan
from .repairs import explained
from .subject import Cut, Differs, Subject, narrowed, sentence

# kinds whose plans may be followed by another: what a norm makes of a constant is made once, so a
# mixture that empties branches first and cuts channels afterwards is not the one that does both
_TWICE = tuple(kind for kind in KINDS if kind != "mixture")
_MOST_FAULTS = 4


def drawn_plans(structure: Structure, seed: int, plans: int) -> list[tuple[str, Plan]]:
    """One that keeps all, some of every kind there are units of, and those that empty branches."""
    drawn = [("nothing", Plan.of(structure))]
    drawn += [
        (kind, plan)
        for kind in KINDS
        for number in range(plans)
        if not (plan := draw_plan(structure, kind, _rng(seed, kind, number))).keeps_everything
    ]
    for kind in ("head", "neuron", "qk_dim"):
        # dims that a norm reads across are there as long as their branch is
        groups = [
            group
            for group in structure.groups
            if group.first.kind == kind and not structure.unpaddable & {*group.names}
        ]
        for said, emptied in ((f"no {kind} in one branch", groups[:1]), (f"no {kind}", groups)):
            kept = {name: () for group in emptied for name in group.names}
            if kept:
                drawn.append((said, Plan.of(structure, kept)))
    return drawn


def _rng(seed: int, *purpose: Any) -> random.Random:
    return random.Random(" ".join(map(str, (seed, *purpose))))


def keeping_all(subject: Subject) -> Iterator[Fault]:
    """A plan that keeps everything changes no bit of any tensor, nor of the logits."""
    pruned = subject.pruned(Plan.of(subject.structure))
    ours, theirs = subject.model.state_dict(), pruned.state_dict()
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield name, f"is in the {'given' if name in ours else 'pruned'} model alone"
    for name, tensor in ours.items():
        if name in theirs and not torch.equal(tensor, theirs[name]):
            yield name, "is not the same bits"
    if not torch.equal(subject.logits(pruned), subject.full):
        yield "logits", "are not the same bits"


# in words, how a plan of a kind breaks; None where it does not
Broken = Callable[[str, Plan], str | None]


@dataclass
class PlanCheck:
    """Something that has to hold for every plan.

    Args:
        name: of it.
        broken: how a plan of a kind breaks it.
        explain: what may be wrong where a plan that cuts no more than it has to breaks it.
        faults: those found so far, one for each place.
    """

    name: str
    broken: Broken
    explain: Callable[[Plan, Sequence[Cut]], str] = lambda plan, cuts: ""
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._kinds: set[str] = set()

    def holds(self, structure: Structure, kind: str, plan: Plan) -> bool:
        """Whether it does; else what breaks it is narrowed down and noted, the first of a kind."""

        def breaks(plan: Plan) -> str | None:
            try:
                return self.broken(kind, plan)
            except Exception as error:
                return sentence(error)

        if breaks(plan) is None:
            return True
        if kind not in self._kinds and len(self.faults) < _MOST_FAULTS:
            self._kinds.add(kind)
            plan, cuts = narrowed(structure, plan, breaks)
            names = [cut if isinstance(cut, str) else cut.name for cut in cuts]
            where = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            if where not in [place for place, _ in self.faults]:
                said = [breaks(plan) or ""]
                with suppress(Exception):
                    # a table that breaks what explains it is not explained
                    said.append(self.explain(plan, cuts))
                found = "; ".join(part for part in said if part)
                self.faults.append((where, f"plans of kind {kind!r}: {found}"))
        return False


def try_plans(subject: Subject, drawn: list[tuple[str, Plan]], checks: Sequence[PlanCheck]) -> None:
    """Every plan through all checks; what follows one that does not hold would say no more."""
    for kind, plan in drawn:
        for check in checks:
            if not check.holds(subject.structure, kind, plan):
                break


def masked_is_pruned(subject: Subject) -> PlanCheck:
    """The pruned model computes what the masked one does."""
    return PlanCheck(
        "masked is pruned",
        lambda kind, plan: subject.broken(plan),
        lambda plan, cuts: explained(subject, plan, cuts),
    )


def cuts_have_an_effect(subject: Subject) -> Iterator[Fault]:
    """Half of the units of every axis, and every branch, change the logits where they go."""
    # the mask of a cut that no box could hold is as clear as any
    structure = replace(subject.structure, unpaddable=set())
    for group in structure.groups:
        axis = group.first
        least = [[u for u in range(axis.size) if u != unit] for unit in range(axis.size)]
        # branches and blocks one by one
        for kept in least if structure.held(axis) else [list(range(axis.size // 2))]:
            try:
                plan = Plan.of(structure, dict.fromkeys(group.names, kept))
                if subject.apart(subject.masked(plan, structure), subject.full) is None:
                    lost = sorted({*range(axis.size)} - {*kept})
                    yield axis.name, f"the logits do not change without the units {_few(lost)}"
            except Exception as error:
                yield axis.name, sentence(error)


def costs_are_predicted(subject: Subject) -> PlanCheck:
    """Params and MACs of what a plan leaves are the predicted ones, of its counts as well."""
    structure, image = subject.structure, _image(subject)

    def broken(kind: str, plan: Plan) -> str | None:
        pruned, predicted = subject.pruned(plan), predict_cost(structure, plan)
        params = sum(parameter.numel() for parameter in pruned.parameters())
        found = {"counted": (params, count_macs(lambda: pruned(image)))}
        counts = _counts(structure, plan)
        if _is_even(structure, plan, counts):
            reading = Reading.of_counts(structure, counts, plan.removed)
            found["predicted of its counts"] = (reading.params, reading.macs)
        for how, (params, macs) in found.items():
            if (params, macs) != (predicted.params, predicted.macs):
                return (
                    f"{how} are {params:,} params and {macs:,} MACs, predicted "
                    f"{predicted.params:,} and {predicted.macs:,}"
                )
        return None

    return PlanCheck("cost", broken)


def _image(subject: Subject) -> Tensor:
    return subject.images.new_zeros(1, *subject.structure.input_size)


def costs_of_modules(subject: Subject) -> Iterator[Fault]:
    """The innermost modules whose products the table counts otherwise than PyTorch."""
    model, structure, image = subject.model, subject.structure, _image(subject)
    counted = count_macs_by_module(model, lambda: model(image))
    # what a module computes by itself, without a call of the part that the table names, is its own
    predicted = dict.fromkeys(counted, 0)
    for work in structure.work:
        macs = work.positions * math.prod(dim.length() for dim in work.dims)
        for path in predicted:
            if not path or f"{work.module}.".startswith(f"{path}."):
                predicted[path] += macs
    wrong = [path for path, macs in predicted.items() if macs != counted[path]]
    for path in wrong:
        inside = f"{path}." if path else ""
        if not any(other != path and other.startswith(inside) for other in wrong):
            where = path or type(model).__name__
            yield where, f"{counted[path]:,} MACs, predicted {predicted[path]:,}"


def _counts(structure: Structure, plan: Plan) -> dict[str, int]:
    """How many units a plan keeps; of dims of heads, the most in a head."""
    counts = {}
    for axis in structure.axes.values():
        # an axis without parent has its whole size as width
        parents = [unit // axis.width for unit in plan[axis.name]]
        if not structure.held(axis):
            counts[axis.name] = max(Counter(parents).values(), default=0)
    return counts


def _is_even(structure: Structure, plan: Plan, counts: dict[str, int]) -> bool:
    """Whether every kept parent unit keeps as many, so that counts say all of a plan."""
    return all(
        len(plan[axis.name]) == counts[axis.name] * len(plan[axis.parent.name])
        for axis in structure.axes.values()
        if axis.parent is not None
    )


def results_are_described(subject: Subject) -> PlanCheck:
    """The family finds the sizes of the plan in the pruned model."""

    def broken(kind: str, plan: Plan) -> str | None:
        again = _described(subject, subject.pruned(plan))
        reading, pairs = _survivors(subject.structure, again, plan)
        for axis, new in pairs:
            parents = 1 if axis.parent is None else len(plan[axis.parent.name])
            size = reading.extent[axis.name] * parents
            if (new.kind, new.size) != (axis.kind, size):
                return f"{new.name} has {new.size} units of kind {new.kind!r}, not {size}"
        return None

    return PlanCheck("described again", broken)


def twice_is_once(subject: Subject, seed: int) -> PlanCheck:
    """A plan, then another one of its kind on the result, is the one plan that does both."""

    def broken(kind: str, plan: Plan) -> str | None:
        if kind not in _TWICE:
            return None
        pruned = subject.pruned(plan)
        again = _described(subject, pruned)
        second = Subject(pruned, again, subject.images)
        then = draw_plan(again, kind, _rng(seed, kind, "then"))
        both = _composed(subject.structure, again, plan, then)
        got, want = second.pruned(then), subject.pruned(both)
        return subject.apart(second.logits(got), subject.logits(want))

    return PlanCheck("twice is once", broken)


def _described(subject: Subject, pruned: nn.Module) -> Structure:
    return describe(pruned, subject.structure.input_size)


def _survivors(
    structure: Structure, again: Structure, plan: Plan
) -> tuple[Reading, list[tuple[Axis, Axis]]]:
    """The axes of what a plan leaves, each with that of the pruned model."""
    reading = Reading(structure, plan)
    gone = {axis.name for axis in structure.axes_in(reading.dead)}
    old, new = (
        [axis for axis in table.axes.values() if not table.held(axis) and axis.name not in lost]
        for table, lost in ((structure, gone), (again, set[str]()))
    )
    counts = len(new), len(list(again.writes()))
    expected = len(old), sum(write.name not in reading.dead for write in structure.writes())
    if counts != expected:
        raise Differs(
            f"{counts[0]} axes and {counts[1]} branches are found in what is left, not "
            f"{expected[0]} and {expected[1]}"
        )
    return reading, list(zip(old, new, strict=True))


def _composed(structure: Structure, again: Structure, plan: Plan, then: Plan) -> Plan:
    """The plan that cuts at once what ``plan`` and then ``then`` cut."""
    reading, pairs = _survivors(structure, again, plan)
    kept = {name: plan[name] for name in plan if not structure.held(structure.axes[name])}
    for axis, new in pairs:
        dim = as_dim(axis) if axis.parent is None else Dim(((axis.parent, axis),))
        olds = reading.gather(dim)
        # what was filled with zeros is no unit of the first model
        kept[axis.name] = sorted(int(olds[u]) for u in then[new.name] if olds[u] >= 0)
    left = [write.name for write in structure.writes() if write.name not in reading.dead]
    moved = dict(zip([write.name for write in again.writes()], left, strict=True))
    removed = {*plan.removed, *(moved[name] for name in then.removed)}
    return Plan.of(structure, kept, removed)


def _few(units: list[int]) -> str:
    return ", ".join(map(str, units[:4])) + (", ..." if len(units) > 4 else "")
