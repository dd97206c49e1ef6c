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
# with SwiGLU: two thirds of the usual hidden width
VIT_BASE_SWIGLU = Shape(197, 768, 2048, 12, 64)
# shows that a bench runs, and says nothing about speed
VIT_SMALLEST = Shape(5, 64, 128, 4, 16)
