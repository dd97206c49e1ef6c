"""Training and distillation; importing a name loads what it needs, the settings alone no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune_fast.distill.config import DistillConfig
    from vitprune_fast.distill.loop import DistillResult, distill
    from vitprune_fast.distill.losses import (
        Projectors,
        align_tokens,
        cross_entropy,
        distillation_token,
        feature_mse,
        hard_kd,
        hidden_mse,
        manifold,
        manifold_full,
        manifold_inter,
        manifold_intra,
        manifold_random,
        map_blocks,
        qkv_relation,
        soft_kd,
    )
    from vitprune_fast.distill.masks import MaskSchedule
    from vitprune_fast.distill.teachers import Teacher, TeacherSet, resolve_teacher

__all__ = [
    "DistillConfig",
    "DistillResult",
    "MaskSchedule",
    "Projectors",
    "Teacher",
    "TeacherSet",
    "align_tokens",
    "cross_entropy",
    "distill",
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
    "resolve_teacher",
    "soft_kd",
]

_HOMES = {
    **dict.fromkeys(__all__, "losses"),
    "DistillConfig": "config",
    "DistillResult": "loop",
    "MaskSchedule": "masks",
    "Teacher": "teachers",
    "TeacherSet": "teachers",
    "distill": "loop",
    "resolve_teacher": "teachers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
