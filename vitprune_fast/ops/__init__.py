"""The fast ops: each has a readable reference, native forms, and a choice that can be explained.

A ``scored_*`` op is differentiable and takes *probes*: tensors with one number per sample and unit
that are never read. The gradient a probe gets is the derivative of the loss by a gate of value 1 on
the unit, which is its per-sample first-order score.
"""

from __future__ import annotations

from vitprune_fast.ops._dispatch import Backend, Choice, backends
from vitprune_fast.ops.activation_score import ACTIVATIONS, activation_score, scored_activation
from vitprune_fast.ops.attention_score import (
    AttentionScore,
    attention,
    attention_score,
    scored_attention,
)
from vitprune_fast.ops.gated_activation import gated_activation
from vitprune_fast.ops.gated_attention import gated_attention
from vitprune_fast.ops.gated_glu import gated_glu, gated_glu_packed
from vitprune_fast.ops.gather import CASTS, GatherTable, Selection, gather, gather_all
from vitprune_fast.ops.glu_score import glu_score, scored_glu, scored_glu_packed
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
    "GatherTable",
    "Selection",
    "activation_score",
    "attention",
    "attention_score",
    "backends",
    "gated_activation",
    "gated_attention",
    "gated_glu",
    "gated_glu_packed",
    "gather",
    "gather_all",
    "glu_score",
    "kd_cross_entropy",
    "manifold_loss",
    "norm_score",
    "scored_activation",
    "scored_attention",
    "scored_glu",
    "scored_glu_packed",
    "scored_norm",
    "taylor_score",
]
