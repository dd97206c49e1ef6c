"""Each class by itself, where an image has several: T^2 KL, mean over images and classes.

B images, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.losses._base import Comparison, Loss
from vitprune_fast.distill.losses.soft import check_classes
from vitprune_fast.wide import wide


class SoftSigmoid(Loss):
    """The teacher's probability of each class at ``config.temperature``, see ``sigmoid_kd``."""

    on_logits = True

    def __init__(self, config: DistillConfig, student: nn.Module, teacher: nn.Module) -> None:
        self.temperature = config.temperature

    def __call__(self, both: Comparison) -> Tensor:
        return sigmoid_kd(*both.logits(), self.temperature)


def sigmoid_kd(student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """Distance to what the teacher says of each class, ``T^2 * KL(teacher_T || student_T)``.

    With ``p_T = sigmoid(z / T)`` of a class that is there or not, averaged over samples and classes
    as ``binary_cross_entropy`` is, so the gradient with respect to the student's logits is
    ``T * (student_T - teacher_T) / (B * C)``.
    Source: Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023 (arXiv:2308.06453), the
    logit part, which sums over classes and has no T.

    Args:
        student_BC: logits ``(B, C)``; gradients flow here only.
        teacher_BC: logits ``(B, C)``.
        temperature: T > 0; larger compares more of what is nearly certain.

    Returns:
        A scalar in nats, >= 0 up to rounding, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: the teacher has other classes.
    """
    check_classes("sigmoid_kd", student_BC, teacher_BC)
    student = wide(student_BC) / temperature
    teacher = (wide(teacher_BC.detach()) / temperature).to(student.dtype)
    # that the class is there, and that it is not
    both = (
        F.kl_div(F.logsigmoid(s), F.logsigmoid(t), reduction="sum", log_target=True)
        for s, t in ((student, teacher), (-student, -teacher))
    )
    return sum(both, student.new_zeros(())) / student.numel() * temperature**2
