"""Attention among queries, keys and values.

B images, N tokens, D numbers of all heads of the student, E of the teacher.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from vitprune_fast.distill.losses._base import Comparison, OfBlocks, Reads
from vitprune_fast.wide import wide


class Relation(OfBlocks):
    """``qkv_relation``, averaged over the compared pairs of blocks."""

    def reads(self) -> tuple[Reads, Reads]:
        ours, theirs = self.blocks()
        return Reads(qkv=ours), Reads(qkv=theirs)

    def __call__(self, both: Comparison) -> Tensor:
        return torch.stack([qkv_relation(*pair) for pair in both.qkv(self.pairs)]).mean()


def qkv_relation(student_BN3D: Tensor, teacher_BN3E: Tensor) -> Tensor:
    """Mean cross-entropy between the teacher's and the student's relations of tokens.

    With M_1, M_2, M_3 the queries, keys and values of all heads side by side, W numbers wide, a
    relation is ``R_ab = softmax(M_a M_b^T / sqrt(W))`` and the loss ``mean_ab mean_bn
    CE(R_ab(teacher), R_ab(student))`` over all nine. Neither the heads nor their dims need be as
    many on both sides. Its least value is the entropy of the teacher's relations, not 0; the
    gradient is 0 there.

    Source: Zhang et al., "MiniViT: Compressing Vision Transformers with Weight Multiplexing", CVPR
    2022 (arXiv:2204.07154), self-attention distillation.

    Args:
        student_BN3D: packed q, k, v of one layer, ``(B, N, 3, D)``; gradients flow here only.
        teacher_BN3E: the same of the teacher, ``(B, N, 3, E)``.

    Returns:
        A scalar >= 0 in nats, fp32 (fp64 for fp64 tensors).
    """
    ours = wide(student_BN3D).unbind(2)
    theirs = teacher_BN3E.detach().to(ours[0].dtype).unbind(2)
    terms = []
    with torch.autocast(student_BN3D.device.type, enabled=False):
        for a, b in product(range(3), repeat=2):
            student = _logits(ours[a], ours[b]).log_softmax(-1)
            teacher = _logits(theirs[a], theirs[b]).softmax(-1)
            terms.append(-(teacher * student).sum(-1).mean())
    return torch.stack(terms).mean()


def _logits(a_BNW: Tensor, b_BNW: Tensor) -> Tensor:
    return a_BNW @ b_BNW.mT * a_BNW.shape[2] ** -0.5
