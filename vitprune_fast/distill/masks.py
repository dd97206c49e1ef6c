"""Training while pruning: which units are live when, and a step that runs on those alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from vitprune_fast.distill.attention import is_maskable, quicker, tokens_of
from vitprune_fast.distill.optim import checkpointing
from vitprune_fast.errors import InvalidInput
from vitprune_fast.gates import attach
from vitprune_fast.planning import Budget, Plan, plan
from vitprune_fast.scoring import score
from vitprune_fast.structure import Structure, describe
from vitprune_fast.surgery.soft_compaction import SoftCompaction

Shape = Literal["one_shot", "linear", "cubic"]
Attention = Literal["auto", "masked", "compact"]
Planner = Callable[[nn.Module, float, Sequence[Any]], Plan]


@dataclass(frozen=True)
class MaskSchedule:
    """When 0/1 masks change while a model trains, and by how much.

    A step computes with the live units alone (see ``SoftCompaction``), so it gets faster as units
    go; weights and optimizer stay whole, and every change is made from scores of the whole model,
    so that pruned units can come back.

    With x the share of the way from ``start`` to ``end`` the budget goes from 1 to its goal along
    ``1 - x`` (``linear``), ``(1 - x)^3`` (``cubic``; Zhu and Gupta, "To prune, or not to prune",
    2017, arXiv:1710.01878, equation 1) or at once (``one_shot``).

    Attributes:
        macs: share of the multiply-accumulates that is left in the end, in (0, 1].
        shape: as above.
        start: share of the run after which the first units go, in [0, 1).
        end: share of the run at which the goal is reached; the masks stay from there on.
        every: steps between two changes.
        units: kinds to cut, see ``plan``.
        samples: training images to score on at each change.
        attention: how the copy attends: with the live heads alone (``compact``), or with all heads
            by our op, which skips dead ones (``masked``: the same shapes whatever is live, but
            larger matrix products around it). ``auto`` is the faster one by measurements on
            such a device, else compact; see ``attention.quicker``.
        criterion: see ``score``.
        planner: (model, share, batches) -> Plan, in place of ``score`` and ``plan``; its plans
            remove no whole branches.

    Raises:
        InvalidInput: a value is out of range.
    """

    macs: float = 0.5
    shape: Shape = "cubic"
    start: float = 0.0
    end: float = 0.5
    every: int = 50
    units: tuple[str, ...] = ("head", "neuron")
    samples: int = 256
    attention: Attention = "auto"
    criterion: str = "taylor"
    planner: Planner | None = None

    def __post_init__(self) -> None:
        rules = {
            "macs": (0 < self.macs <= 1, "be in (0, 1]"),
            "shape": (self.shape in get_args(Shape), f"be one of {', '.join(get_args(Shape))}"),
            "start": (0 <= self.start < 1, "be in [0, 1)"),
            "end": (self.start <= self.end <= 1, "be between start and 1"),
            "every": (self.every >= 1, "be at least 1"),
            "samples": (self.samples >= 1, "be at least 1"),
            "attention": (
                self.attention in get_args(Attention),
                f"be one of {', '.join(get_args(Attention))}",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InvalidInput(f"MaskSchedule: {name} must {rule}, got {getattr(self, name)}")

    def share(self, step: int, steps: int) -> float:
        """Share of the multiply-accumulates that the masks of a step leave, of a run of ``steps``.

        It changes every ``every`` steps from ``start`` on, and at ``end``, in the last step at the
        latest.
        """
        # the last step at least computes with what comes out
        last = min(round(self.end * steps), steps - 1)
        first = min(round(self.start * steps), last)
        if step < first:
            return 1.0
        if self.shape == "one_shot" or step >= last:
            return self.macs
        done = (step - first) // self.every * self.every / max(last - first, 1)
        left = 1 - done if self.shape == "linear" else (1 - done) ** 3
        return self.macs + (1 - self.macs) * left

    def choose(
        self, model: nn.Module, structure: Structure, share: float, batches: Sequence[Any]
    ) -> Plan:
        """The plan that leaves ``share``; ``batches`` are training images to score on."""
        if share >= 1:
            return Plan.of(structure)
        if self.planner is not None:
            return self.planner(model, share, batches).check(structure)
        # under checkpointing the model would run again in the backward of the scores
        with checkpointing(model, False):
            scores = score(model, batches, criterion=self.criterion, units=self.units)
        return plan(structure, scores, Budget(macs=share), units=self.units)


class MaskedStudent:
    """A student of which a part is live; the copy that runs is rebuilt at every change.

    Args:
        student: the masters.
        schedule: when the part changes.
        dtype: of the copy; None is that of the masters.

    Raises:
        InvalidInput: the schedule wants masked attention, and an attention is not one that our op
            stands in for.
    """

    def __init__(
        self, student: nn.Module, schedule: MaskSchedule, dtype: torch.dtype | None = None
    ) -> None:
        self._student, self.schedule, self._dtype = student, schedule, dtype
        self._structure = describe(student)
        #: the share the schedule asked for
        self.share = 1.0
        self._soft: SoftCompaction | None = None
        self._maskable = is_maskable(student, self._structure)
        if schedule.attention == "masked" and not self._maskable:
            raise InvalidInput(
                "distill: attention must be auto or compact for this student, got masked; our op "
                "stands in for timm's attention without an inner norm, gate or dropout"
            )
        #: which units are live
        self.plan: Plan = Plan.of(self._structure)

    @property
    def soft(self) -> SoftCompaction:
        """The live part."""
        if self._soft is None:
            masked = self.attention == "masked"
            heads = {a.name: range(a.size) for a in self._structure.units("head") if masked}
            plan = Plan.of(self._structure, {**self.plan, **heads})
            self._soft = SoftCompaction(self._student, plan, self._dtype)
            if masked:
                copy = self._soft.model
                live = Plan.of(describe(copy), {name: self.plan[name] for name in heads})
                attach(copy, ("head",), "fixed", init=live)
        return self._soft

    @property
    def attention(self) -> Literal["masked", "compact"]:
        """How the live part attends."""
        axes = self._structure.units("head")
        live = sum(len(self.plan[axis.name]) for axis in axes)
        dead = 1 - live / max(sum(axis.size for axis in axes), 1)
        wanted = self.schedule.attention
        if not dead or not self._maskable:
            return "compact"
        if wanted == "auto":
            weight = next(self._student.parameters())
            return quicker(
                weight.device, self._dtype or weight.dtype, tokens_of(self._structure), dead
            )
        return wanted

    def update(self, step: int, steps: int, batches: Callable[[], Sequence[Any]]) -> bool:
        """Change the masks if the schedule says so before this step; says whether it did.

        Args:
            step: number of the step, from 0.
            steps: of the whole run.
            batches: gives training images to score on.
        """
        share = self.schedule.share(step, steps)
        if share == self.share:
            return False
        self.set(self.schedule.choose(self._student, self._structure, share, batches()), share)
        return True

    def set(self, plan: Plan, share: float) -> None:
        """Take a plan, e.g. from a checkpoint."""
        if plan.removed:
            raise InvalidInput(
                f"MaskSchedule: planner must remove no branches while training, got a plan that "
                f"removes {sorted(plan.removed)[0]}; leave its units out instead"
            )
        self.plan, self.share, self._soft = plan, share, None

    def alive(self) -> dict[str, tuple[int, int]]:
        """Unit kind -> live units and all units, of the kinds that are cut."""
        counts = {}
        for kind in self.schedule.units:
            axes = self._structure.units(kind)
            kept = sum(len(self.plan[axis.name]) for axis in axes)
            counts[kind] = (kept, sum(axis.size for axis in axes))
        return counts
