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
        """Adjacent columns that make one unit of an axis."""
        return self.dim.length() // axis.size

    def owners(self, axis: Axis) -> Tensor:
        """(columns,) int64: the unit of an axis that each column belongs to; -1 is nobody's."""
        return torch.from_numpy(self.dim.owners(axis))
