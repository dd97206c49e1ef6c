"""Softened logits: T^2 KL, mean over images.

B images, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitprune_fast._checks import require
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.losses._base import Comparison, Loss
from vitprune_fast.wide import wide

# what the divergences of a batch are divided by: images, logits, or nothing
Reduction = Literal["batchmean", "numel", "sum"]


class Soft(Loss):
    """The teacher's probabilities at ``config.temperature``, see ``soft_kd``."""

    on_logits = one_class = True
    reduction: ClassVar[Reduction] = "batchmean"

    def __init__(self, config: DistillConfig, student: nn.Module, teacher: nn.Module) -> None:
        self.temperature = config.temperature

    def __call__(self, both: Comparison) -> Tensor:
        return soft_kd(*both.logits(), self.temperature, reduction=self.reduction)


def soft_kd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Distance to the teacher's softened distribution: ``T^2 * KL(teacher_T || student_T)``.

    With ``p_T = softmax(z / T)``, summed over classes and averaged over samples, so the gradient
    with respect to the student's logits is ``T * (student_T - teacher_T) / B`` whatever ``C`` is.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015
    (arXiv:1503.02531), section 2.

    Args:
        student_BC: logits ``(B, C)``; gradients flow here only.
        teacher_BC: logits ``(B, C)``.
        temperature: T > 0; larger compares more of the small probabilities.
        reduction: divides by B (``batchmean``), by B * C (``numel``) or by nothing (``sum``).

    Returns:
        A scalar in nats, >= 0 up to rounding, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: the teacher has other classes.
    """
    check_classes("soft_kd", student_BC, teacher_BC)
    student = F.log_softmax(wide(student_BC) / temperature, dim=1)
    teacher = F.log_softmax(wide(teacher_BC.detach()) / temperature, dim=1).to(student.dtype)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    divided_by = {"batchmean": len(student), "numel": student.numel(), "sum": 1}[reduction]
    return divergence / divided_by * temperature**2


def check_classes(op: str, student_BC: Tensor, teacher_BC: Tensor) -> None:
    """Raise unless there are as many logits of both."""
    rule = f"have shape {tuple(student_BC.shape)} like student_BC, the same classes"
    same = teacher_BC.shape == student_BC.shape
    require(same, op, "teacher_BC", rule, tuple(teacher_BC.shape))
