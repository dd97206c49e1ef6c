"""The surviving entries of one tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..structure.axes import Dim
from ..structure.index import Index


def gather_tensor(old: Tensor, index: Index, layout: tuple[Dim, ...]) -> Tensor:
    """The surviving entries of one tensor, as a fresh contiguous tensor of the same dtype.

    Args:
        old: any tensor with this layout (a parameter, its optimizer moment, its EMA).
        index: of the plan.
        layout: one Dim per dimension of ``old``.
    """
    if old.ndim == 0:
        return old.detach().clone()
    shape = tuple(index.length(dim) for dim in layout)
    rows = _selection(index, layout[:1])
    columns = _selection(index, layout[1:])
    if rows is None and columns is None:
        return old.detach().clone(memory_format=torch.contiguous_format)
    device = old.device
    flat = old.detach().reshape(old.shape[0], -1)
    return ops.gather(
        flat,
        None if rows is None else torch.from_numpy(rows).to(device),
        None if columns is None else torch.from_numpy(columns).to(device),
    ).view(shape)


def _selection(index: Index, dims: tuple[Dim, ...]) -> np.ndarray | None:
    """Old positions along flattened dimensions, None where all stay."""
    positions, identity = np.zeros(1, dtype=np.int64), True
    for dim in dims:
        size, one = dim.length(), index.gather(dim)
        identity &= len(one) == size and bool((one == np.arange(size)).all())
        lost = (positions[:, None] < 0) | (one < 0)
        positions = np.where(lost, -1, positions[:, None] * size + one).ravel()
    return None if identity else positions
