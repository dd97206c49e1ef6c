"""Manifold losses: similarities among the student's tokens against those among the teacher's.

B images, N tokens, D width of the student, E width of the teacher. Source: Hao et al., "Learning
Efficient Vision Transformers via Fine-Grained Manifold Distillation", NeurIPS 2022
(arXiv:2107.01378). Its formulas have Frobenius norms; its code, from which the published weights
are, has means over all elements, and so has everything here. No projector: similarities have no
width. Tokens are brought together by ``align_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitprune_fast._checks import require
from vitprune_fast.distill.losses.features import check_pairs
from vitprune_fast.distill.losses.gram import manifold_full
from vitprune_fast.distill.losses.tokens import align_tokens
from vitprune_fast.ops.manifold_loss import manifold_loss
from vitprune_fast.transfer import sent

# published with the weights below
NUM_ROWS = 192


def manifold_intra(
    student_BND: Tensor,
    teacher_BNE: Tensor,
    *,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
) -> Tensor:
    """Mean squared difference of the similarities among the tokens of each image.

    Args:
        student_BND: states ``(B, N, D)``; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``.
        student_prefix: see ``align_tokens``.
        teacher_prefix: see ``align_tokens``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states); see ``ops.manifold_loss``.

    Raises:
        InvalidInput: tokens that cannot be brought together.
    """
    student_BND, teacher_BNE = align_tokens(
        student_BND,
        teacher_BNE,
        student_prefix=student_prefix,
        teacher_prefix=teacher_prefix,
        op="manifold_intra",
    )
    return _loss(student_BND, teacher_BNE)


def manifold_inter(
    student_BND: Tensor,
    teacher_BNE: Tensor,
    *,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
) -> Tensor:
    """Mean squared difference of the similarities among the images at each position.

    Depends on the batch of this process: nothing is gathered from others.

    Args:
        student_BND: states ``(B, N, D)``, B >= 2; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``.
        student_prefix: see ``align_tokens``.
        teacher_prefix: see ``align_tokens``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states); see ``ops.manifold_loss``.

    Raises:
        InvalidInput: a single image, or tokens that cannot be brought together.
    """
    op = "manifold_inter"
    rule = "have at least 2 images, as one is always similar to itself"
    require(student_BND.shape[0] >= 2, op, "student_BND", rule, student_BND.shape[0])
    student_BND, teacher_BNE = align_tokens(
        student_BND,
        teacher_BNE,
        student_prefix=student_prefix,
        teacher_prefix=teacher_prefix,
        op=op,
    )
    return _loss(student_BND.transpose(0, 1), teacher_BNE.transpose(0, 1))


def manifold_random(
    student_BND: Tensor,
    teacher_BNE: Tensor,
    generator: torch.Generator,
    num_rows: int = NUM_ROWS,
    *,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
) -> Tensor:
    """Mean squared difference of the similarities among rows drawn from all images and tokens.

    Args:
        student_BND: states ``(B, N, D)``; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``, of which the same rows are taken.
        generator: of the CPU; what is drawn follows from its state alone, without replacement.
        num_rows: rows to draw; all of them where there are no more.
        student_prefix: see ``align_tokens``.
        teacher_prefix: see ``align_tokens``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states); see ``ops.manifold_loss``.

    Raises:
        InvalidInput: ``num_rows`` below 2, or tokens that cannot be brought together.
    """
    op = "manifold_random"
    require(num_rows >= 2, op, "num_rows", "be at least 2", num_rows)
    student_BND, teacher_BNE = align_tokens(
        student_BND,
        teacher_BNE,
        student_prefix=student_prefix,
        teacher_prefix=teacher_prefix,
        op=op,
    )
    batch, tokens, _ = student_BND.shape
    drawn_K = torch.randperm(batch * tokens, generator=generator)[:num_rows]
    drawn_K = sent(drawn_K, student_BND.device)
    # by image and token, so that nothing but these rows is copied
    at = drawn_K // tokens, drawn_K % tokens
    return _loss(student_BND[at][None], teacher_BNE.detach()[at][None])


def manifold(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    generator: torch.Generator,
    *,
    intra: float = 4.0,
    inter: float = 0.1,
    random: float = 0.2,
    full: float = 0.0,
    num_rows: int = NUM_ROWS,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
) -> Tensor:
    """The decoupled loss as published, averaged over the compared pairs of blocks.

    ``(1 / pairs) * sum_pairs (intra * L_intra + inter * L_inter + random * L_random + full *
    L_full)``. A term of weight 0 is not computed. In a batch of one image the inter-image term is
    left out, as it is 0 whatever the student does.

    Args:
        students: states ``(B, N, D)`` in the order of the pairs; gradients flow here only. The
            published pairs are blocks 0-3 and 8-11 of DeiT with 0-3 and 20-23 of CaiT-S24.
        teachers: states ``(B, N, E)``, as many.
        generator: of the CPU, for the random rows: new ones for each pair and call.
        intra: weight of ``manifold_intra``; the default weights are the published ones.
        inter: weight of ``manifold_inter``.
        random: weight of ``manifold_random``.
        full: weight of ``manifold_full``, whose elements the other terms are samples of.
        num_rows: of ``manifold_random``.
        student_prefix: see ``align_tokens``.
        teacher_prefix: see ``align_tokens``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states).

    Raises:
        InvalidInput: numbers of states or tokens that do not fit, or a weight below 0.
    """
    op = "manifold"
    check_pairs(op, students, teachers)
    weights = {"intra": intra, "inter": inter, "random": random, "full": full}
    for name, weight in weights.items():
        require(weight >= 0, op, name, "be at least 0", weight)
    require(any(weights.values()), op, "intra, inter, random and full", "not all be 0", weights)
    total = torch.zeros((), device=students[0].device)
    for student, teacher in zip(students, teachers, strict=True):
        student, teacher = align_tokens(
            student,
            teacher.detach(),
            student_prefix=student_prefix,
            teacher_prefix=teacher_prefix,
            op=op,
        )
        # as many tokens on both sides from here on
        if intra:
            total = total + intra * manifold_intra(student, teacher)
        if inter and student.shape[0] > 1:
            total = total + inter * manifold_inter(student, teacher)
        elif inter:
            # of the student all the same, so that a loss of nothing else has a backward
            total = total + 0 * student[0, 0, 0]
        if random:
            total = total + random * manifold_random(student, teacher, generator, num_rows)
        if full:
            total = total + full * manifold_full(student, teacher)
    return total / len(students)


def _loss(student_SRD: Tensor, teacher_SRE: Tensor) -> Tensor:
    """With products in the dtype of autocast where it is on, like torch's own there."""
    device = student_SRD.device.type
    operand = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if operand == torch.float32:
        operand = None
    return manifold_loss(student_SRD, teacher_SRE, operand_dtype=operand)
