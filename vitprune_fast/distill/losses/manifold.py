"""Similarities of tokens: within an image, across images, and of random ones.

B images, N tokens, D width of the student, E width of the teacher. Source: Hao et al., "Learning
Efficient Vision Transformers via Fine-Grained Manifold Distillation", NeurIPS 2022
(arXiv:2107.01378). Its formulas have Frobenius norms; its code, from which the published weights
are, has means over all elements, and so has everything here. No projector: similarities have no
width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from vitprune_fast._checks import require
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.losses._base import Comparison, OfBlocks
from vitprune_fast.ops.manifold_loss import manifold_loss
from vitprune_fast.transfer import sent

INTRA, INTER, RANDOM = 4.0, 0.1, 0.2
"""The published weights of the three parts."""


class Similarities(OfBlocks):
    """A loss on the similarities of tokens, averaged over the compared pairs of blocks.

    Published for blocks 0-3 and 8-11 of DeiT with 0-3 and 20-23 of CaiT-S24.
    """

    ends = 4

    def __init__(self, config: DistillConfig, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(config, student, teacher)
        self.num_rows = config.manifold_rows

    def __call__(self, both: Comparison) -> Tensor:
        pairs = both.states(self.pairs)
        return torch.stack([self.of(*pair, both.generator) for pair in pairs]).mean()

    @abstractmethod
    def of(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one pair of states ``(B, N, D)`` and ``(B, N, E)``."""


class Manifold(Similarities):
    """The decoupled loss as published: ``4 * L_intra + 0.1 * L_inter + 0.2 * L_random``.

    With new random rows for each pair and step, of which 192 are published. In a batch of one image
    the inter-image part is left out, as it is 0 whatever the student does. ``manifold_intra``,
    ``manifold_inter`` and ``manifold_random`` are its parts.
    """

    def of(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        total = INTRA * manifold_intra(student, teacher)
        if len(student) > 1:
            total = total + INTER * manifold_inter(student, teacher)
        return total + RANDOM * manifold_random(student, teacher, generator, self.num_rows)


def manifold_intra(student_BND: Tensor, teacher_BNE: Tensor) -> Tensor:
    """Mean squared difference of the similarities among the tokens of each image.

    Args:
        student_BND: states ``(B, N, D)``; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states); see ``ops.manifold_loss``.
    """
    return _loss(student_BND, teacher_BNE)


def manifold_inter(student_BND: Tensor, teacher_BNE: Tensor) -> Tensor:
    """Mean squared difference of the similarities among the images at each position.

    Depends on the batch of this process: nothing is gathered from others.

    Args:
        student_BND: states ``(B, N, D)``, B >= 2; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states); see ``ops.manifold_loss``.

    Raises:
        InvalidInput: a single image.
    """
    rule = "have at least 2 images, as one is always similar to itself"
    require(len(student_BND) >= 2, "manifold_inter", "student_BND", rule, len(student_BND))
    return _loss(student_BND.transpose(0, 1), teacher_BNE.transpose(0, 1))


def manifold_random(
    student_BND: Tensor, teacher_BNE: Tensor, generator: torch.Generator, num_rows: int = 192
) -> Tensor:
    """Mean squared difference of the similarities among rows drawn from all images and tokens.

    Args:
        student_BND: states ``(B, N, D)``; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``, of which the same rows are taken.
        generator: of the CPU; what is drawn follows from its state alone, without replacement.
        num_rows: rows to draw, at least 2; all of them where there are no more.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states); see ``ops.manifold_loss``.
    """
    batch, tokens, _ = student_BND.shape
    drawn_K = torch.randperm(batch * tokens, generator=generator)[:num_rows]
    drawn_K = sent(drawn_K, student_BND.device)
    # by image and token, so that nothing but these rows is copied
    at = drawn_K // tokens, drawn_K % tokens
    return _loss(student_BND[at][None], teacher_BNE.detach()[at][None])


def _loss(student_SRD: Tensor, teacher_SRE: Tensor) -> Tensor:
    """With products in the dtype of autocast where it is on, like torch's own there."""
    device = student_SRD.device.type
    operand = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if operand == torch.float32:
        operand = None
    return manifold_loss(student_SRD, teacher_SRE, operand_dtype=operand)
