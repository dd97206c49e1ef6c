"""Losses on logits; B samples, C classes. All are computed in fp32 at least.

Labels are numbers of classes, ``(B,)`` int64, or shares of classes, ``(B, C)``, as mixup makes.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_fast._checks import require
from vitprune_fast.distill.losses.precision import wide

Reduction = Literal["batchmean", "numel", "sum"]
# what is done with the divergences of a batch: mean over samples, over all logits, or their sum
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def cross_entropy(logits_BC: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy against labels smoothed towards uniform.

    Args:
        logits_BC: ``(B, C)``, any floating dtype.
        labels: ``(B,)`` int64 in ``[0, C)``, or shares ``(B, C)`` of any floating dtype.
        label_smoothing: the share of a label spread over all classes, ``[0, 1]``.

    Returns:
        A scalar in nats, >= 0, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: labels of another shape or kind.
    """
    check_labels("cross_entropy", logits_BC, labels)
    logits_BC = wide(logits_BC)
    if labels.is_floating_point():
        labels = labels.to(logits_BC.dtype)
    return F.cross_entropy(logits_BC, labels, label_smoothing=label_smoothing)


def soft_kd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "batchmean",
    times_squared_temperature: bool = True,
) -> Tensor:
    """Distance to the teacher's softened distribution: ``T^2 * KL(teacher_T || student_T)``.

    With ``p_T = softmax(z / T)``, summed over classes and averaged over samples, so the gradient
    with respect to the student's logits is ``T * (student_T - teacher_T) / B`` whatever ``C`` is.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015
    (arXiv:1503.02531), section 2.

    The forms of others: ``"numel"`` divides by B * C, as DeiT's code does, and is C times weaker;
    ``"sum"`` divides by nothing, as UP-ViT's code does, so its weight grows with the batch; NViT
    has ``"numel"`` at T = 20 without the factor T^2.

    Args:
        student_BC: logits ``(B, C)``; gradients flow here only.
        teacher_BC: logits ``(B, C)``.
        temperature: T > 0; larger compares more of the small probabilities.
        reduction: one of ``REDUCTIONS``.
        times_squared_temperature: keep the factor T^2, without which the gradient falls as 1 / T.

    Returns:
        A scalar in nats, >= 0 up to rounding, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: the teacher has other classes, T <= 0, or no reduction has that name.
    """
    op = "soft_kd"
    _check_teacher(op, student_BC, teacher_BC)
    check_softening(op, temperature, reduction)
    student = F.log_softmax(wide(student_BC) / temperature, dim=1)
    teacher = F.log_softmax(wide(teacher_BC.detach()) / temperature, dim=1)
    if teacher.dtype != student.dtype:
        teacher = teacher.to(student.dtype)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    divergence = (
        divergence / {"batchmean": len(student), "numel": student.numel(), "sum": 1}[reduction]
    )
    return divergence * temperature**2 if times_squared_temperature else divergence


def hard_kd(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Mean cross-entropy against the class that the teacher thinks most likely.

    The teacher's label stays a single class where mixup makes those of the images soft.
    Source: Touvron et al., "Training data-efficient image transformers & distillation through
    attention", ICML 2021 (arXiv:2012.12877), section 4, hard-label distillation.

    Args:
        student_BC: logits ``(B, C)``; gradients flow here only.
        teacher_BC: logits ``(B, C)`` of the same augmented images.

    Returns:
        A scalar in nats, >= 0, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: the teacher has other classes.
    """
    _check_teacher("hard_kd", student_BC, teacher_BC)
    return F.cross_entropy(wide(student_BC), teacher_BC.detach().argmax(1))


def distillation_token(
    class_BC: Tensor,
    distillation_BC: Tensor,
    teacher_BC: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    temperature: float | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Loss of a model with two heads: ``(1 - alpha) * CE(class) + alpha * KD(distillation)``.

    The class token's head learns the labels, the distillation token's head the teacher. Source:
    Touvron et al. (arXiv:2012.12877), section 4; alpha is 1/2 there and the teacher's label hard.

    Args:
        class_BC: logits of the class token's head, ``(B, C)``.
        distillation_BC: logits of the distillation token's head, ``(B, C)``.
        teacher_BC: the teacher's logits, ``(B, C)``.
        labels: ``(B,)`` int64 or shares ``(B, C)``.
        alpha: share of the teacher, ``[0, 1]``.
        label_smoothing: of the labels; the teacher's are not smoothed.
        temperature: None for ``hard_kd``, else that of ``soft_kd``.
        reduction: of ``soft_kd``.

    Returns:
        A scalar in nats, >= 0 up to rounding, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: shapes disagree, or an argument is out of range.
    """
    op = "distillation_token"
    rule = f"have shape {tuple(class_BC.shape)} like class_BC"
    same = distillation_BC.shape == class_BC.shape
    require(same, op, "distillation_BC", rule, tuple(distillation_BC.shape))
    require(0 <= alpha <= 1, op, "alpha", "be from 0 to 1", alpha)
    ce = cross_entropy(class_BC, labels, label_smoothing)
    if temperature is None:
        kd = hard_kd(distillation_BC, teacher_BC)
    else:
        kd = soft_kd(distillation_BC, teacher_BC, temperature, reduction=reduction)
    return (1 - alpha) * ce + alpha * kd


def check_labels(op: str, logits_BC: Tensor, labels: Tensor) -> None:
    """Raise unless ``labels`` are one number per row, or one share per logit."""
    batch, classes = logits_BC.shape
    numbers = labels.dtype == torch.int64 and labels.shape == (batch,)
    shares = labels.is_floating_point() and labels.shape == (batch, classes)
    rule = f"be ({batch},) int64 or ({batch}, {classes}) floating"
    got = f"{tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
    require(numbers or shares, op, "labels", rule, got)


def check_softening(op: str, temperature: float, reduction: str) -> None:
    """Raise unless the temperature is positive and finite and the reduction has a name."""
    positive = 0 < temperature < math.inf
    require(positive, op, "temperature", "be positive and finite", temperature)
    known = reduction in REDUCTIONS
    require(known, op, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction))


def _check_teacher(op: str, student_BC: Tensor, teacher_BC: Tensor) -> None:
    rule = f"have shape {tuple(student_BC.shape)} like student_BC, the same classes"
    same = teacher_BC.shape == student_BC.shape
    require(same, op, "teacher_BC", rule, tuple(teacher_BC.shape))
