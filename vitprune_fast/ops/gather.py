"""Pick rows and columns of a matrix in one pass: how a pruned weight is cut from the whole one.

R, C rows and columns of the source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.reference.gather import gather as _eager

_library = torch.library.Library("vitprune_fast", "FRAGMENT")
_library.define(
    "gather(Tensor source_RC, Tensor? rows, Tensor? columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("vitprune_fast::gather", lib=_library)
def _fake(source_RC: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    num_rows = source_RC.shape[0] if rows is None else rows.shape[0]
    num_columns = source_RC.shape[1] if columns is None else columns.shape[0]
    return source_RC.new_empty(num_rows, num_columns)


def gather(
    source_RC: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Rows and columns of a matrix: ``out[i, j] = source[rows[i], columns[j]]``.

    An index of -1 gives a row or column of zeros. Indices may repeat and stand in any order.
    Not differentiable: the result is cut off from the graph.

    Args:
        source_RC: matrix, ``(R, C)``, any dtype and layout; read in place when its columns are
            adjacent, else copied first.
        rows: which rows, 1-D int64, -1 to ``R - 1``; None for all.
        columns: which columns, 1-D int64, -1 to ``C - 1``; None for all.
        backend: implementation to run (``"cpu"`` is the C++ kernel); an explicit choice never
            falls back.

    Returns:
        ``(len(rows), len(columns))``, contiguous, of the source's dtype and device; a copy of
        the source's bits, so the same for every backend and number of threads.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: a shape, dtype, device or index is out of range.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    _checks.require_tensor("gather", "source_RC", source_RC)
    _checks.require_dims("gather", "source_RC", source_RC, 2)
    for name, index, size in (
        ("rows", rows, source_RC.shape[0]),
        ("columns", columns, source_RC.shape[1]),
    ):
        if index is not None:
            _checks.require_index("gather", name, index, size, source_RC.device)
    source_RC = source_RC.detach()
    if choose("gather", source_RC.device, backend) == "cpu":
        return torch.ops.vitprune_fast.gather(source_RC, rows, columns)
    return _eager(source_RC, rows, columns)
