"""The loss of labels; B samples, C classes.

Labels are numbers of classes, ``(B,)`` int64, or shares of classes, ``(B, C)``, as mixup makes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_fast._checks import require
from vitprune_fast.wide import wide


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
    logits_BC = _checked("cross_entropy", logits_BC, labels)
    if labels.is_floating_point():
        labels = labels.to(logits_BC.dtype)
    return F.cross_entropy(logits_BC, labels, label_smoothing=label_smoothing)


def binary_cross_entropy(
    logits_BC: Tensor, labels: Tensor, label_smoothing: float = 0.0, threshold: float | None = None
) -> Tensor:
    """Every class decided by itself: mean over samples and classes.

    Sources: Wightman et al., "ResNet strikes back", 2021 (arXiv:2110.00476), section 3; Touvron et
    al., "DeiT III: Revenge of the ViT", ECCV 2022 (arXiv:2204.07118), section 3.

    Args:
        logits_BC: ``(B, C)``, any floating dtype.
        labels: ``(B,)`` int64 in ``[0, C)``, or shares ``(B, C)`` of any floating dtype.
        label_smoothing: the share of a label spread over all classes, ``[0, 1]``.
        threshold: a class whose share is above is there (1), any other is not (0); None takes
            shares as they are.

    Returns:
        A scalar in nats, >= 0, fp32 (fp64 for fp64 logits).

    Raises:
        InvalidInput: labels of another shape or kind.
    """
    logits_BC = _checked("binary_cross_entropy", logits_BC, labels)
    if not labels.is_floating_point():
        # not one_hot, which looks for the largest label and so waits for a device
        labels = torch.zeros_like(logits_BC).scatter_(1, labels[:, None], 1.0)
    shares = labels.to(logits_BC.dtype)
    if threshold is not None:
        shares = (shares > threshold).to(shares.dtype)
    shares = shares * (1 - label_smoothing) + label_smoothing / shares.shape[1]
    return F.binary_cross_entropy_with_logits(logits_BC, shares)


def _checked(op: str, logits_BC: Tensor, labels: Tensor) -> Tensor:
    """Logits in fp32 at least; labels must be one number per row, or one share per logit."""
    batch, classes = logits_BC.shape
    numbers = labels.dtype == torch.int64 and labels.shape == (batch,)
    shares = labels.is_floating_point() and labels.shape == (batch, classes)
    rule = f"be ({batch},) int64 or ({batch}, {classes}) floating"
    got = f"{tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
    require(numbers or shares, op, "labels", rule, got)
    return wide(logits_BC)
