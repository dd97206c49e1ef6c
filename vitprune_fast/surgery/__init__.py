"""Cutting units out of a model, and making it behave as if they were cut."""

from __future__ import annotations

from .mask import mask
from .prune import prune

__all__ = ["mask", "prune"]
