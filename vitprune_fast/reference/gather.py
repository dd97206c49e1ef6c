"""Oracle of ``ops.gather_all``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitprune_fast.transfer import sent

Index = NDArray[np.int64] | None


def gather(source_RC: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """``out[i, j] = source[rows[i], columns[j]]``; an index of -1 gives zeros, None means all."""
    out = source_RC
    for dim, index in enumerate((rows, columns)):
        if index is None:
            continue
        padding = out.new_zeros([1 if d == dim else size for d, size in enumerate(out.shape)])
        # the row of zeros stands last, where -1 points to
        padded = torch.cat([out, padding], dim)
        out = padded.index_select(dim, index.remainder(padded.shape[dim]))
    return out.clone() if out is source_RC else out


def gather_all(
    sources: Iterable[Tensor], targets: Sequence[Tensor], kept: Iterable[tuple[Index, Index]]
) -> None:
    """Write into each target the kept (rows, columns) of its source, one after the other."""
    for source, target, indices in zip(sources, targets, kept, strict=True):
        rows, columns = (
            None if index is None else sent(torch.from_numpy(index), source.device)
            for index in indices
        )
        target.copy_(gather(source, rows, columns))
