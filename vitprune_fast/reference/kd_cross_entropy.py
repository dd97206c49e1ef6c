"""Oracle of ``ops.kd_cross_entropy``; B samples, C classes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitprune_fast.wide import wide_dtype


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
    """``ce_weight * ce + kd_weight * kd``, and both: means over samples of sums over classes.

    ``ce = -q log p(s)`` with smoothed shares q, and ``kd`` is ``factor`` times the divergence
    ``p(t / T) (log p(t / T) - log p(s / T))``. In fp64 for an fp64 student and else in fp32.
    """
    dtype = wide_dtype(student_BC)
    student_BC, teacher_BC = student_BC.to(dtype), teacher_BC.to(dtype)
    if labels.is_floating_point():
        labels = labels.to(dtype)
    ce = F.cross_entropy(student_BC, labels, label_smoothing=label_smoothing)
    log_s_BC = (student_BC / temperature).log_softmax(1)
    log_t_BC = (teacher_BC / temperature).log_softmax(1)
    kd = factor * F.kl_div(log_s_BC, log_t_BC, reduction="batchmean", log_target=True)
    return ce_weight * ce + kd_weight * kd, ce, kd
