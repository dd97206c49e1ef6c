"""The dtype that ops and losses compute in: fp64 for fp64, and else fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """What is computed, and accumulated, in for ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in that dtype."""
    return x.to(wide_dtype(x))
