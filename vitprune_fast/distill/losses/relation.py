"""Relations among queries, keys and values of attention, student against teacher.

B images, N tokens, H heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitprune_fast._checks import require, require_dims
from vitprune_fast.distill.losses.precision import wide
from vitprune_fast.distill.losses.tokens import align_tokens


def qkv_relation(
    student_BN3HK: Tensor,
    teacher_BN3HK: Tensor,
    relations: Literal["all", "same"] = "all",
    *,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
) -> Tensor:
    """Mean cross-entropy between the teacher's and the student's relations of tokens.

    With M_1, M_2, M_3 the queries, keys and values of all heads side by side, W numbers wide, a
    relation is ``R_ab = softmax(M_a M_b^T / sqrt(W))`` and the loss ``mean_ab mean_bn
    CE(R_ab(teacher), R_ab(student))``. Neither the heads nor their dims need be as many on both
    sides. Its least value is the entropy of the teacher's relations, not 0; the gradient is 0
    there.

    Source: Zhang et al., "MiniViT: Compressing Vision Transformers with Weight Multiplexing", CVPR
    2022 (arXiv:2204.07154), self-attention distillation.

    Args:
        student_BN3HK: packed q, k, v of one layer, ``(B, N, 3, H, K)``; gradients flow here only.
        teacher_BN3HK: the same of the teacher, with its own H and K.
        relations: ``"all"`` nine, or the three of each with the ``"same"``.
        student_prefix: see ``align_tokens``.
        teacher_prefix: see ``align_tokens``.

    Returns:
        A scalar >= 0 in nats, fp32 (fp64 for fp64 tensors).

    Raises:
        InvalidInput: other shapes, tokens that cannot be brought together, or no such relations.
    """
    op = "qkv_relation"
    for name, x in (("student_BN3HK", student_BN3HK), ("teacher_BN3HK", teacher_BN3HK)):
        require_dims(op, name, x, 5)
        require(x.shape[2] == 3, op, name, "have 3 parts, q, k and v", x.shape[2])
    known = relations in ("all", "same")
    require(known, op, "relations", "be 'all' or 'same'", repr(relations))
    pairs = zip(
        wide(student_BN3HK).flatten(3).unbind(2),
        teacher_BN3HK.detach().to(wide(student_BN3HK[:0]).dtype).flatten(3).unbind(2),
        strict=True,
    )
    parts = [
        align_tokens(
            student, teacher, student_prefix=student_prefix, teacher_prefix=teacher_prefix, op=op
        )
        for student, teacher in pairs
    ]
    terms = []
    with torch.autocast(student_BN3HK.device.type, enabled=False):
        for a in range(3):
            for b in range(3) if relations == "all" else (a,):
                student = _logits(parts[a][0], parts[b][0]).log_softmax(-1)
                teacher = _logits(parts[a][1], parts[b][1]).softmax(-1)
                terms.append(-(teacher * student).sum(-1).mean())
    return torch.stack(terms).mean()


def _logits(a_BNW: Tensor, b_BNW: Tensor) -> Tensor:
    return a_BNW @ b_BNW.mT * a_BNW.shape[2] ** -0.5
