"""Settings of the search for separate ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from vitprune_fast.config.model import Amount
from vitprune_fast.config.rules import (
    Positive,
    PositiveInt,
    PositiveShare,
    Rule,
    check,
)
from vitprune_fast.errors import InvalidInput

Values = Annotated[
    tuple[float, ...],
    Rule(
        "different shares in [0, 1)",
        lambda values: (
            len(values) == len(set(values)) > 0 and all(0 <= value < 1 for value in values)
        ),
    ),
]


@dataclass(frozen=True)
class SearchConfig:
    """How separate pruning ratios are searched for."""

    mode: Literal["iterative", "grid", "equal-macs", "fixed"] = "iterative"
    """`grid`: every pair of ratios; `iterative`: cuts in rounds, by bisection; `equal-macs`: the
    best pair of one cost; `fixed`: one ratio for all kinds, by bisection."""
    tolerance: Positive = 0.005
    """Accuracy that may be lost on the validation images, 0.005 for half a point; where `macs` says
    how far to go, `equal-macs` and `fixed` have none."""
    macs: Amount = None
    """Multiply-accumulates, as a share up to 1 or a number: what all candidates of `equal-macs`
    have, what `fixed` meets with the smallest ratio, where `iterative` stops; unset: as far as the
    tolerance allows."""
    values: Values = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Ratios of `grid`: shares of the units of a kind that go."""
    rounds: PositiveInt = 4
    """Of `iterative`; each may lose an equal part of the tolerance more."""
    step: PositiveShare = 0.01
    """Smallest cut of `iterative`, as a share of the units left of a kind, one unit at least; the
    ratio of `fixed` is a multiple of it."""
    round_cut: PositiveShare = 0.5
    """Largest cut of a kind in a round of `iterative`, as a share of the units left."""
    objective: Literal["top1", "loss"] = "top1"
    """What is best in `equal-macs`; the loss is less noisy."""
    images: Annotated[PositiveInt | None, arg(metavar="N")] = None
    """Validation images for each candidate; what is chosen is checked on all; unset: all."""
    evaluations: Annotated[PositiveInt | None, arg(metavar="N")] = None
    """Most candidates to evaluate; unset: what the mode takes."""
    rescore: bool = True
    """Score what is left again after every cut of `iterative`."""

    @property
    def by_cost(self) -> bool:
        """Whether `macs` alone says how far to go, and not the tolerance."""
        return self.mode == "equal-macs" or (self.mode == "fixed" and self.macs is not None)

    def __post_init__(self) -> None:
        check("search", self)
        together = {
            "macs": (
                (self.macs is not None, "be given for equal-macs")
                if self.mode == "equal-macs"
                else (self.macs is None or self.mode != "grid", "be unset for grid")
            ),
            "objective": (
                self.objective == "top1" or self.mode == "equal-macs",
                f"be top1 for {self.mode}, whose tolerance is one of accuracy",
            ),
            "step": (self.step <= self.round_cut, "be at most round_cut"),
        }
        for name, (holds, rule) in together.items():
            if not holds:
                raise InvalidInput(f"search: {name} must {rule}, got {getattr(self, name)}")
