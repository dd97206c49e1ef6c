"""Shapes of real ViTs, patch 16: (tokens, width, MLP hidden, heads, head dim)."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one model."""

    tokens: int
    width: int
    hidden: int
    heads: int
    head_dim: int


VIT_TINY = Shape(197, 192, 768, 3, 64)
VIT_BASE = Shape(197, 768, 3072, 12, 64)
# the same at 384 pixels instead of 224
VIT_BASE_384 = Shape(577, 768, 3072, 12, 64)
