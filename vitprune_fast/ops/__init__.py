"""The fast ops: each has a readable reference, native forms, and a choice that can be explained.

A ``scored_*`` op is differentiable and takes *probes*: tensors with one number per sample and unit
that are never read. The gradient a probe gets is the derivative of the loss by a gate of value 1 on
the unit, which is its per-sample first-order score.
"""

from __future__ import annotations

from vitprune_fast.ops._dispatch import Backend, Choice, backends
from vitprune_fast.ops.attention_score import (
    AttentionScore,
    attention,
    attention_score,
    scored_attention,
)
from vitprune_fast.ops.gated_attention import gated_attention
from vitprune_fast.ops.gated_unit import (
    ACTIVATIONS,
    GatedUnitScore,
    Packed,
    gated_unit,
    gated_unit_score,
)
from vitprune_fast.ops.gather import CASTS, GatherTable, Selection, gather_all
from vitprune_fast.ops.kd_cross_entropy import kd_cross_entropy
from vitprune_fast.ops.manifold_loss import manifold_loss
from vitprune_fast.ops.norm_score import norm_score, scored_norm
from vitprune_fast.ops.taylor_score import taylor_score

__all__ = [
    "ACTIVATIONS",
    "CASTS",
    "AttentionScore",
    "Backend",
    "Choice",
    "GatedUnitScore",
    "GatherTable",
    "Packed",
    "Selection",
    "attention",
    "attention_score",
    "backends",
    "gated_attention",
    "gated_unit",
    "gated_unit_score",
    "gather_all",
    "kd_cross_entropy",
    "manifold_loss",
    "norm_score",
    "scored_attention",
    "scored_norm",
    "taylor_score",
]
