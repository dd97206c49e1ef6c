"""The teacher's class.

B images, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitprune_fast.distill.losses._base import Comparison, Loss
from vitprune_fast.distill.losses.soft import check_classes
from vitprune_fast.wide import wide


class Hard(Loss):
    """See ``hard_kd``."""

    on_logits = one_class = True

    def __call__(self, both: Comparison) -> Tensor:
        return hard_kd(*both.logits())


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
    check_classes("hard_kd", student_BC, teacher_BC)
    return F.cross_entropy(wide(student_BC), teacher_BC.detach().argmax(1))
