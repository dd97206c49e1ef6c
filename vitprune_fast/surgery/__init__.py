"""Cutting units out of a model, and making it behave as if they were cut."""

from __future__ import annotations

from .folds import fold_attention_biases, fold_gates
from .mask import mask
from .prune import prune
from .soft_compaction import SoftCompaction
from .sweep import Fit, SweepReport, SweepStopped

__all__ = [
    "Fit",
    "SoftCompaction",
    "SweepReport",
    "SweepStopped",
    "fold_attention_biases",
    "fold_gates",
    "mask",
    "prune",
]
