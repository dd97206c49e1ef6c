"""How much of the model's work is left under gates that train, and a loss that holds it down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..planning.budget import Budget
from ..planning.cost import predict_cost
from ..structure import Axis, Dim, Structure
from .module import Gates


def mac_ratio(structure: Structure, openness: Mapping[str, Tensor]) -> Tensor:
    """Multiply-accumulates under gates, as a share of those of the whole model.

    Args:
        structure: of the model.
        openness: axis name -> (units,) how much of each unit counts, in [0, 1], for at least one
            axis; axes that are not named count whole. As ``Gates.openness`` gives it.

    Returns:
        0-dimensional, fp64, differentiable: a polynomial in the sums over the units of each axis.
        For openness of 0 and 1 it is exactly what ``predict_cost`` says of the pruned model, which
        is what ``cost`` counts. Head dims are stored at one width, that of the widest head: only
        those of that head get a gradient.

    Raises:
        InvalidInput: no axis, one that the model does not have, or another number of units.
    """
    _check_openness(structure, openness)
    return _MacRatio(structure, openness)(openness)


def _check_openness(structure: Structure, openness: Mapping[str, Tensor]) -> None:
    if not openness:
        raise InvalidInput("gates.mac_ratio: openness must be of one axis at least, got none")
    for name, value in openness.items():
        axis = structure.axes.get(name)
        if axis is None or value.shape != (axis.size,):
            raise InvalidInput(
                f"gates.mac_ratio: openness must be of axes of the model, got {tuple(value.shape)} "
                f"for {name!r}, which has {axis.size if axis else 'no'} units"
            )


# products of stored widths, by the names of their axes, and the factor of each
Terms = dict[tuple[str, ...], int]


class _MacRatio:
    """The polynomial, multiplied out once for the axes that are gated."""

    def __init__(self, structure: Structure, gated: Mapping[str, Tensor]):
        self._structure = structure
        self._full = predict_cost(structure).macs
        # a gated head dim also moves the width that others of its box are stored at
        self._boxes = {
            axis.name: next((box for box in structure.boxes if axis in box), (axis,))
            for axis in structure.axes.values()
        }
        self._varying = {
            name for name, box in self._boxes.items() if any(a.name in gated for a in box)
        }
        self._terms: dict[Dim | None, Terms] = {}
        for work in structure.work:
            terms: Terms = {(): work.positions}
            for dim in work.dims:
                terms = _product(terms, self._expanded(dim))
            sums = self._terms.setdefault(self._watched(work.module, gated), {})
            for names, factor in terms.items():
                sums[names] = sums.get(names, 0) + factor

    def _expanded(self, dim: Dim) -> Terms:
        terms: Terms = {}
        for part in dim.parts:
            varying = [f for f in part if isinstance(f, Axis) and f.name in self._varying]
            constant = tuple(f for f in part if f not in varying)
            names = tuple(sorted(f.name for f in varying))
            terms[names] = terms.get(names, 0) + Dim((constant,)).length()
        return terms

    def _watched(self, module: str, gated: Mapping[str, Tensor]) -> Dim | None:
        """What the branch of a module computes with, where it may die without losing its heads."""
        for write in self._structure.writes():
            if write.inner is not None and f"{module}.".startswith(f"{write.name}."):
                factors = [f for part in write.inner.parts for f in part if isinstance(f, Axis)]
                by_dims = any(f.parent is not None and f.name in gated for f in factors)
                return write.inner if by_dims else None
        return None

    def __call__(self, openness: Mapping[str, Tensor]) -> Tensor:
        wide = {name: value.double() for name, value in openness.items()}
        widths = {name: self._stored(name, wide) for name in sorted(self._varying)}
        total = next(iter(wide.values())).new_zeros(())
        for inner, terms in self._terms.items():
            macs = total.new_zeros(())
            for names, factor in terms.items():
                macs = macs + factor * math.prod(widths[name] for name in names)
            # with all its dims gone the branch goes, though a head stores one of them at least
            alive = 1 if inner is None else (self._useful(inner, wide) > 0).double()
            total = total + macs * alive
        return total / self._full

    def _stored(self, name: str, wide: Mapping[str, Tensor]) -> Tensor:
        """The width of an axis in the tensors; for head dims that of the widest live head."""
        box = self._boxes[name]
        if len(box) == 1:
            return wide[name].sum()
        widest = [self._per_parent(axis, wide).amax() for axis in box]
        return torch.stack(widest).amax().clamp(min=1)

    def _per_parent(self, axis: Axis, wide: Mapping[str, Tensor]) -> Tensor:
        open_ = wide.get(axis.name)
        if open_ is None:
            open_ = next(iter(wide.values())).new_ones(axis.size)
        if axis.parent is None:
            return open_.sum().view(1)
        counts = open_.view(axis.parent.size, axis.width).sum(1)
        parent = wide.get(axis.parent.name)
        return counts if parent is None else counts.where(parent > 0, 0.0)

    @torch.no_grad()
    def _useful(self, dim: Dim, wide: Mapping[str, Tensor]) -> Tensor:
        """Entries of a dimension that hold a kept unit."""
        total = next(iter(wide.values())).new_zeros(())
        for part in dim.parts:
            children = [f for f in part if isinstance(f, Axis) and f.parent is not None]
            parents = {child.parent for child in children}
            count: Any = 1
            for factor in part:
                if isinstance(factor, int):
                    count = count * factor
                elif factor in parents:
                    own = wide.get(factor.name)
                    each = total.new_ones(factor.size) if own is None else own
                    for child in children:
                        if child.parent == factor:
                            each = each * self._per_parent(child, wide)
                    count = count * each.sum()
                elif factor.parent is None:
                    own = wide.get(factor.name)
                    count = count * (factor.size if own is None else own.sum())
            total = total + count
        return total


def _product(a: Terms, b: Terms) -> Terms:
    product: Terms = {}
    for left, x in a.items():
        for right, y in b.items():
            names = tuple(sorted((*left, *right)))
            product[names] = product.get(names, 0) + x * y
    return product


class BudgetLoss(nn.Module):
    """What gates cost above a budget: ``l1 max(0, c - c*) + l2 max(0, c - c*)^2``.

    c is :func:`mac_ratio` of ``gates.openness()``. The multipliers are parameters that the
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
        self.limit = Budget(macs=macs).limit(full) / full.macs
        openness = gates.openness()
        self._gates = (gates,)  # in a tuple, so that its parameters are not this module's
        self._ratio = _MacRatio(gates.structure, openness)
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
