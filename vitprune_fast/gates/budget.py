"""How much of the model's work is left under gates that train, and a loss that holds it down."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..planning.budget import Budget
from ..planning.cost import predict_cost
from ..structure import Dim, Structure
from ..structure.reading import Reading
from ..structure.terms import Home, Polynomial
from .module import Gates


class MacRatio:
    """Multiply-accumulates under gates, as a share of those of the whole model.

    A polynomial in the sums over the units of each gated axis, differentiable. For openness of 0
    and 1 it is exactly what ``predict_cost`` gives for the pruned model, which is what ``cost``
    counts. The q/k dims of all heads are stored at one width, that of the widest head, and so are
    the v dims: only those of that head get a gradient.

    Args:
        structure: of the model.
        gated: names of the axes that have gates; the others count whole.
    """

    def __init__(self, structure: Structure, gated: Collection[str]):
        self._structure = structure
        full = Reading(structure)
        self._full = full.macs
        # a gated head dim also moves the width that others of its box are stored at
        boxes = [box for box in structure.boxes if any(axis.name in gated for axis in box)]
        varying = {*gated, *(axis.name for box in boxes for axis in box)}
        self._terms: dict[Dim | None, Polynomial] = {}
        for home, terms in structure.mac_terms.over(varying, full.extent).items():
            sums = self._terms.setdefault(_watched(structure, home, gated), {})
            for names, factor in terms.items():
                sums[names] = sums.get(names, 0) + factor

    def __call__(self, openness: Mapping[str, Tensor]) -> Tensor:
        """The share, 0-dimensional, fp64.

        Args:
            openness: gated axis -> (units,) how much of each unit counts as kept, in [0, 1].
        """
        wide = {name: value.double() for name, value in openness.items()}
        reading = Reading.of_openness(self._structure, wide)
        total = next(iter(wide.values())).new_zeros(())
        for inner, terms in self._terms.items():
            macs = total.new_zeros(())
            for names, factor in terms.items():
                macs = macs + factor * math.prod(reading.extent[name] for name in names)
            if inner is not None:
                with torch.no_grad():
                    # a head stores one of its dims at least, also when its branch goes with them
                    alive = (reading.useful(inner) > 0).double()
                macs = macs * alive
            total = total + macs
        return total / self._full


def _watched(structure: Structure, home: Home, gated: Collection[str]) -> Dim | None:
    """What a branch computes with, where it may die without losing its heads."""
    for write in structure.writes():
        if home == (write.name, True) and write.inner is not None:
            by_dims = any(axis.parent and axis.name in gated for axis in write.inner.axes)
            return write.inner if by_dims else None
    return None


class BudgetLoss(nn.Module):
    """What gates cost above a budget: ``l1 max(0, c - c*) + l2 max(0, c - c*)^2``.

    c is the :class:`MacRatio` of ``gates.openness()``. The multipliers are parameters that the
    optimizer drives *up* while the budget is exceeded (their gradient has its sign turned), as in
    an augmented Lagrangian; once it is met, loss and gradients are 0.

    Reference: Yu et al., "Width & Depth Pruning for Vision Transformers", AAAI 2022, where the
    multipliers have a negative learning rate.

    Args:
        gates: of the model.
        macs: multiply-accumulates allowed: a share of the model's, or a number, as for ``Budget``.
        multipliers: what l1 and l2 start at.

    Raises:
        InvalidInput: ``macs`` is out of range, or a multiplier is below 0.
    """

    def __init__(
        self, gates: Gates, macs: float | int, multipliers: tuple[float, float] = (0.0, 0.0)
    ):
        super().__init__()
        if any(not 0 <= value < math.inf for value in multipliers):
            raise InvalidInput(f"BudgetLoss: multipliers must be numbers >= 0, got {multipliers!r}")
        full = predict_cost(gates.structure)
        self.limit = Budget(macs=macs).limits(full)["macs"] / full.macs
        openness = gates.openness()
        self._gates = (gates,)  # in a tuple, so that its parameters are not this module's
        self._ratio = MacRatio(gates.structure, openness)
        like = next(iter(openness.values()))
        self.l1, self.l2 = (
            nn.Parameter(torch.tensor(value, dtype=like.dtype, device=like.device))
            for value in multipliers
        )

    def ratio(self) -> Tensor:
        """c, 0-dimensional, fp64, differentiable."""
        return self._ratio(self._gates[0].openness())

    def forward(self) -> Tensor:
        """The loss, 0-dimensional, of the dtype of the gates."""
        over = (self.ratio() - self.limit).clamp(min=0).to(self.l1.dtype)
        return _ascending(self.l1) * over + _ascending(self.l2) * over.square()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The group of the multipliers for an optimizer; without weight decay."""
        return [{"params": [self.l1, self.l2], "lr": lr, "weight_decay": 0.0}]


def _ascending(multiplier: Tensor) -> Tensor:
    """Itself, with a gradient that an optimizer follows upwards."""
    return 2 * multiplier.detach() - multiplier
