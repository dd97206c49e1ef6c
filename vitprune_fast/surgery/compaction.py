"""The surviving entries of all tensors of a model, its moments and its average, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops import GatherTable, Selection
from ..structure.axes import Dim
from ..structure.reading import Reading

Layout = tuple[Dim, ...]


class Compaction:
    """Where every entry of every tensor goes under a plan; computed once, for any dtype.

    Args:
        layouts: one Dim per dimension of every tensor, by its name.
        reading: of the plan.
    """

    def __init__(self, layouts: Mapping[str, Layout], reading: Reading):
        self._shapes = {
            name: tuple(reading.length(dim) for dim in layout) for name, layout in layouts.items()
        }
        # tensors of one layout have one entry
        numbers: dict[Layout, int] = {}
        self._entries = {
            name: numbers.setdefault(layout, len(numbers)) for name, layout in layouts.items()
        }
        positions: dict[Layout, np.ndarray | None] = {}
        selections = []
        for layout in numbers:
            rows, columns = split = _as_matrix(layout)
            for dims in split:
                if dims not in positions:
                    positions[dims] = _positions(reading, dims)
            shape = _size(rows), _size(columns)
            selections.append(Selection(shape, positions[rows], positions[columns]))
        self.table = GatherTable(selections)

    def entry(self, name: str) -> int:
        """Which entry of the table a tensor follows."""
        return self._entries[name]

    def __call__(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        dtypes: Sequence[torch.dtype | None] | None = None,
    ) -> list[Tensor]:
        """The surviving entries of tensors, each given with the name whose layout it has.

        Args:
            tensors: (name, tensor) of parameters, their moments, their averages.
            dtypes: of the results, where one differs (see ``ops.gather_all``).

        Returns:
            Fresh contiguous tensors on the same devices; one call moves all that lie on one device.
        """
        dtypes = [None] * len(tensors) if dtypes is None else dtypes
        results: list[Tensor] = [torch.empty(0)] * len(tensors)
        places: dict[torch.device, list[int]] = {}
        for i, (_, tensor) in enumerate(tensors):
            places.setdefault(tensor.device, []).append(i)
        for numbers in places.values():
            moved = ops.gather_all(
                [tensors[i][1] for i in numbers],
                self.table,
                [self._entries[tensors[i][0]] for i in numbers],
                dtypes=[dtypes[i] for i in numbers],
            )
            for i, matrix in zip(numbers, moved, strict=True):
                results[i] = matrix.view(self._shapes[tensors[i][0]])
        return results


def _as_matrix(layout: Layout) -> tuple[Layout, Layout]:
    """Dimensions of the rows and of the columns; a position embedding (1, N, C) has N rows."""
    first = next((i for i, dim in enumerate(layout) if dim.length() != 1), 0)
    return layout[: first + 1], layout[first + 1 :]


def _size(dims: Layout) -> int:
    return math.prod(dim.length() for dim in dims)


def _positions(reading: Reading, dims: Layout) -> np.ndarray | None:
    """Old positions along flattened dimensions, None where all stay."""
    positions, identity = np.zeros(1, dtype=np.int64), True
    for dim in dims:
        size, one = dim.length(), reading.gather(dim)
        identity &= len(one) == size and bool((one == np.arange(size)).all())
        lost = (positions[:, None] < 0) | (one < 0)
        positions = np.where(lost, -1, positions[:, None] * size + one).ravel()
    return None if identity else positions
