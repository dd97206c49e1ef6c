"""Oracle of ``ops.kd_cross_entropy``, and its gradient in closed form; B samples, C classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def shares(labels: Tensor, like_BC: Tensor, label_smoothing: float) -> Tensor:
    """``(B, C)`` smoothed shares of classes, of labels that are numbers or shares."""
    if not labels.is_floating_point():
        labels = F.one_hot(labels, like_BC.shape[1])
    return labels.to(like_BC.dtype) * (1 - label_smoothing) + label_smoothing / like_BC.shape[1]


def kd_cross_entropy(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels: Tensor,
    ce_weight: float,
    kd_weight: float,
    factor: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ce_weight * ce + kd_weight * kd``, and both: means of their sums over classes.

    ``ce = -q log p(s)`` with smoothed shares q, and ``factor`` times the divergence ``p(t / T)
    (log p(t / T) - log p(s / T))``.
    """
    student_BC, teacher_BC = _wide(student_BC), _wide(teacher_BC)
    q_BC = shares(labels, student_BC, label_smoothing)
    ce = -(q_BC * student_BC.log_softmax(1)).sum(1).mean()
    log_t_BC = (teacher_BC / temperature).log_softmax(1)
    log_s_BC = (student_BC / temperature).log_softmax(1)
    kd = factor * (log_t_BC.exp() * (log_t_BC - log_s_BC)).sum(1).mean()
    return ce_weight * ce + kd_weight * kd, ce, kd


def with_gradient(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels: Tensor,
    ce_weight: float,
    kd_weight: float,
    factor: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same three, and the gradient of the first w.r.t. the student's logits, in fp32 at least.

    ``(ce_weight * (p sum(q) - q) + kd_weight * factor / T * (p_T - t_T)) / B``.
    """
    student_BC, teacher_BC = _wide(student_BC), _wide(teacher_BC)
    log_p_BC = student_BC.log_softmax(1)
    if labels.is_floating_point() or label_smoothing:
        q_BC = shares(labels, student_BC, label_smoothing)
        ce = -(q_BC * log_p_BC).sum(1).mean()
        grad_BC = log_p_BC.exp() * q_BC.sum(1, keepdim=True) - q_BC
    else:
        ce = F.nll_loss(log_p_BC, labels)
        grad_BC = log_p_BC.exp()
        grad_BC[torch.arange(len(labels), device=labels.device), labels] -= 1
    batch = student_BC.shape[0]
    grad_BC *= ce_weight / batch
    log_t_BC = (teacher_BC / temperature).log_softmax(1)
    log_s_BC = log_p_BC if temperature == 1 else (student_BC / temperature).log_softmax(1)
    t_BC = log_t_BC.exp()
    kd = factor * (t_BC * (log_t_BC - log_s_BC)).sum(1).mean()
    grad_BC.add_(log_s_BC.exp().sub_(t_BC), alpha=kd_weight * factor / temperature / batch)
    return ce_weight * ce + kd_weight * kd, ce, kd, grad_BC
