"""``vp.score`` and ``vp.describe`` by the names they had for transformers' classifiers."""

from __future__ import annotations

from ..scoring import score
from ..structure import describe as units

__all__ = ["score", "units"]
