"""Axes, and the dimensions of tensors that are made of them.

An *axis* is an ordered set of removable units. Every dimension of every parameter and buffer is a
concatenation of products of axes and fixed sizes, outermost first, written with ``+`` and ``*``:
``heads * qk_dims + heads * qk_dims + heads * v_dims``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

UNIT_KINDS = (
    "head",
    "qk_dim",
    "v_dim",
    "neuron",
    "embed",
    "attn_branch",
    "mlp_branch",
    "block",
)
# of which a unit is a branch, or a block of them
DEPTH_KINDS = UNIT_KINDS[-3:]


class _Algebra:
    """``+`` concatenates and ``*`` nests, outermost first."""

    def __add__(self, other: Axis | Dim | int) -> Dim:
        return Dim(as_dim(self).parts + as_dim(other).parts)

    def __mul__(self, other: Axis | Dim | int) -> Dim:
        return Dim(tuple(a + b for a in as_dim(self).parts for b in as_dim(other).parts))

    def __rmul__(self, other: int) -> Dim:
        return Dim(tuple((other, *part) for part in as_dim(self).parts))


@dataclass(frozen=True)
class Axis(_Algebra):
    """An ordered set of removable units.

    ``size`` counts all units. With a ``parent``, every parent unit owns ``width`` of them, numbered
    ``parent * width + j``; each parent keeps its own subset, and losing the parent loses them.
    """

    name: str
    size: int
    kind: str
    parent: Axis | None = None

    @property
    def width(self) -> int:
        """Units per parent unit (all of them when there is no parent)."""
        return self.size // self.parent.size if self.parent else self.size


@dataclass(frozen=True)
class Dim(_Algebra):
    """One tensor dimension: a concatenation of products of axes and fixed sizes."""

    parts: tuple[tuple[Axis | int, ...], ...]

    def length(self, extent: Mapping[str, int] | None = None) -> int:
        """Number of entries; ``extent`` gives the stored width of axes that differ from full."""
        return sum(math.prod(_extent(f, extent or {}) for f in part) for part in self.parts)

    @property
    def axes(self) -> Iterator[Axis]:
        """The axes it is made of, as often as they occur."""
        return (factor for part in self.parts for factor in part if isinstance(factor, Axis))

    def part(self, number: int) -> Dim:
        """One of the products that are concatenated."""
        return Dim(self.parts[number : number + 1])

    def owners(self, axis: Axis) -> np.ndarray:
        """Which unit of ``axis`` each entry belongs to, int64; -1 is none."""
        found = []
        for part in self.parts:
            sizes = [f if isinstance(f, int) else f.width for f in part]
            names = [f if isinstance(f, int) else f.name for f in part]
            total = math.prod(sizes)
            if axis.name not in names:
                found.append(np.full(total, -1, dtype=np.int64))
                continue
            digits = np.unravel_index(np.arange(total), sizes)
            unit = digits[names.index(axis.name)]
            if axis.parent is not None:
                unit = unit + digits[names.index(axis.parent.name)] * axis.width
            found.append(unit)
        return np.concatenate(found)


def as_dim(value: _Algebra | int) -> Dim:
    """A single axis or fixed size as a Dim."""
    if isinstance(value, Dim):
        return value
    assert isinstance(value, (Axis, int))
    return Dim(((value,),))


def _extent(factor: Axis | int, extent: Mapping[str, int]) -> int:
    return factor if isinstance(factor, int) else extent.get(factor.name, factor.width)


@dataclass(frozen=True)
class Group:
    """Axes that keep the same units, because tied parameters run over them; usually one axis."""

    axes: tuple[Axis, ...]

    @property
    def first(self) -> Axis:
        """Their representative: all have the same kind and size."""
        return self.axes[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of its axes, in model order."""
        return tuple(axis.name for axis in self.axes)
