"""Losses of training and distillation; B samples, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Mean cross-entropy against labels smoothed towards uniform.

    Args:
        logits_BC: ``(B, C)``, any floating dtype; computed in fp32 at least.
        labels_B: ``(B,)`` int64 in ``[0, C)``.
        label_smoothing: the share of a label spread over all classes, ``[0, 1]``.

    Returns:
        A scalar in nats, >= 0, fp32 (fp64 for fp64 logits).
    """
    return F.cross_entropy(_wide(logits_BC), labels_B, label_smoothing=label_smoothing)


def soft_kd(
    student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Distance to the teacher's softened distribution: ``T^2 * KL(teacher_T || student_T)``.

    With ``p_T = softmax(z / T)``, summed over classes and averaged over samples, so the gradient
    with respect to the student's logits is ``T * (student_T - teacher_T) / B`` whatever ``C`` is.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015
    (arXiv:1503.02531), section 2.

    Args:
        student_BC: logits ``(B, C)``; gradients flow here only.
        teacher_BC: logits ``(B, C)``.
        temperature: T > 0; larger compares more of the small probabilities.

    Returns:
        A scalar in nats, >= 0 up to rounding, fp32 (fp64 for fp64 logits).
    """
    student = F.log_softmax(_wide(student_BC) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_BC.detach()) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
