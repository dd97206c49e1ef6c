"""The arithmetic that every loss is computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()
