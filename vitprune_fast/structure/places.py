"""Where units pass by in a forward: what is gated, measured or selected away there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .axes import Axis, Dim


@dataclass(frozen=True)
class Place:
    """The last dimension of what enters or leaves a module, or of what a norm normalises.

    Args:
        module: path of the module.
        at: ``input`` or ``output`` of it. Or it is a norm across the units: ``norm`` where what it
            puts out is read, ``statistics`` where it stands in a write into their stream, so that
            units that go change its statistics and nothing else.
        dim: layout of the dimension, of the columns alone where there are some.
        columns: first and last + 1 column that hold units; None is all of them.
    """

    module: str
    at: Literal["input", "output", "norm", "statistics"]
    dim: Dim
    columns: tuple[int, int] | None = None

    def width(self, axis: Axis) -> int:
        """Columns that make one unit of an axis."""
        return self.dim.length() // axis.size

    def owners(self, axis: Axis) -> Tensor:
        """(columns,) int64: the unit of an axis that each column belongs to; -1 is nobody's."""
        return torch.from_numpy(self.dim.owners(axis))

    def is_scattered(self, axis: Axis) -> bool:
        """Whether the columns of a unit are not side by side, as where rotation pairs halves."""
        owners = self.dim.owners(axis)
        return bool((owners[1:] < owners[:-1]).any())

    def side_by_side(self, axis: Axis, x: Tensor) -> Tensor:
        """``(..., columns)`` with the columns of a unit side by side, in the order of the units."""
        sizes, own = self._digits(axis)
        first = x.ndim - 1
        kept = [first + at for at in range(len(sizes)) if own[at]]
        rest = [first + at for at in range(len(sizes)) if not own[at]]
        return x.unflatten(-1, sizes).permute(*range(first), *kept, *rest).flatten(first)

    def spread(self, axis: Axis, values_U: Tensor) -> Tensor:
        """(units,) as (columns,): to each column what its unit has."""
        sizes, own = self._digits(axis)
        shape = [size if is_own else 1 for size, is_own in zip(sizes, own, strict=True)]
        return values_U.view(shape).expand(sizes).reshape(-1)

    def _digits(self, axis: Axis) -> tuple[list[int], list[bool]]:
        """The sizes of the factors of the only product, and which of them number the units."""
        (factors,) = self.dim.parts
        sizes = [factor if isinstance(factor, int) else factor.width for factor in factors]
        return sizes, [factor in (axis, axis.parent) for factor in factors]
