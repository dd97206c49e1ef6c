"""Training and distillation; importing a name loads what it needs, the settings alone no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune_fast.config.distill import DistillConfig
    from vitprune_fast.distill.loop import DistillResult, distill
    from vitprune_fast.distill.masks import MaskSchedule
    from vitprune_fast.distill.teachers import Teacher, TeacherSet, resolve_teacher

__all__ = [
    "DistillConfig",
    "DistillResult",
    "MaskSchedule",
    "Teacher",
    "TeacherSet",
    "distill",
    "resolve_teacher",
]

_HOMES = {
    "DistillConfig": "vitprune_fast.config.distill",
    "DistillResult": f"{__name__}.loop",
    "MaskSchedule": f"{__name__}.masks",
    "Teacher": f"{__name__}.teachers",
    "TeacherSet": f"{__name__}.teachers",
    "distill": f"{__name__}.loop",
    "resolve_teacher": f"{__name__}.teachers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
