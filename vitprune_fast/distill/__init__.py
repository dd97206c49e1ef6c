"""Training and distillation."""

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
