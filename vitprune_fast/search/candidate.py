"""What a search knows of a set of units that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InvalidInput
from ..planning.plan import Plan


@dataclass(frozen=True)
class Measured:
    """What an evaluation of one plan found.

    Args:
        top1: share of right answers, in [0, 1].
        images: how many there were.
        loss: mean cross-entropy in nats; None where it is not finite, or was not measured.
        seen: tells images apart from other ones; all evaluations of a kind must say the same.
    """

    top1: float
    images: int
    loss: float | None = None
    seen: str = ""

    def __post_init__(self) -> None:
        finite = self.loss is None or math.isfinite(self.loss)
        if not 0 <= self.top1 <= 1 or self.images < 1 or not finite:
            raise InvalidInput(
                "search: evaluate must give a top1 in [0, 1], at least one image and a finite loss "
                f"or None, got {self}"
            )


Evaluate = Callable[[Plan], Measured]
"""Measures the model as if it were cut by a plan."""


@dataclass(frozen=True)
class Candidate:
    """A set of units that stay, why it was tried, and what was found.

    Attributes:
        step: of the search, in words.
        ratios: unit kind -> share of its units that go.
        kept: unit kind -> how many units stay.
        macs: multiply-accumulates of one image, as the pruned model has them.
        params: parameters, as the pruned model has them.
        top1: share of right answers, in [0, 1].
        loss: mean cross-entropy in nats, where it was measured.
        images: that it was measured on.
        feasible: whether it was good enough for its step.
        reason: why it was, or was not.
        plan: the units.
    """

    step: str
    ratios: Mapping[str, float]
    kept: Mapping[str, int]
    macs: int
    params: int
    top1: float
    loss: float | None
    images: int
    feasible: bool
    reason: str
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """All but the plan, as plain values."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)[:-1]}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
