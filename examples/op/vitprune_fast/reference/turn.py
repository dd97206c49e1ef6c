"""Oracle of ``ops.turn``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def turn(before_BND: Tensor, after_BND: Tensor) -> Tensor:
    """``1 - mean_n cos(before, after)``, ``(B,)``; in fp64 for fp64 inputs, else in fp32."""
    wide = torch.promote_types(before_BND.dtype, torch.float32)
    return 1 - cosine_similarity(before_BND.to(wide), after_BND.to(wide), dim=2).mean(1)
