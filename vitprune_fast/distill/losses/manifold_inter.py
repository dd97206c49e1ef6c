"""Similarities among the images at each position, the second part of manifold; weight 0.1."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.distill.losses.manifold import INTER, Similarities, manifold_inter


class ManifoldInter(Similarities):
    """See ``manifold_inter``."""

    weight = INTER

    def of(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        # one image is similar to itself, whatever the student does
        one = len(student) == 1
        return (0 * student).sum() if one else manifold_inter(student, teacher)
