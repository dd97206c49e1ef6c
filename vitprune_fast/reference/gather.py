"""Oracle of ``ops.gather``."""

from __future__ import annotations

import torch
from torch import Tensor


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
