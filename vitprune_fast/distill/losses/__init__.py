"""Losses of training and distillation, computed in fp32 at least; gradients reach students only."""

from __future__ import annotations

from vitprune_fast.distill.losses.features import Projectors, feature_mse, hidden_mse
from vitprune_fast.distill.losses.gram import manifold_full
from vitprune_fast.distill.losses.logits import (
    cross_entropy,
    distillation_token,
    hard_kd,
    soft_kd,
)
from vitprune_fast.distill.losses.manifold import (
    manifold,
    manifold_inter,
    manifold_intra,
    manifold_random,
)
from vitprune_fast.distill.losses.relation import qkv_relation
from vitprune_fast.distill.losses.tokens import align_tokens, map_blocks

__all__ = [
    "Projectors",
    "align_tokens",
    "cross_entropy",
    "distillation_token",
    "feature_mse",
    "hard_kd",
    "hidden_mse",
    "manifold",
    "manifold_full",
    "manifold_inter",
    "manifold_intra",
    "manifold_random",
    "map_blocks",
    "qkv_relation",
    "soft_kd",
]
