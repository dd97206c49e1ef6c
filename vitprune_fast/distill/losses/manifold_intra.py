"""Similarities among the tokens of each image, the first part of manifold; weight 4."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.distill.losses.manifold import INTRA, Similarities, manifold_intra


class ManifoldIntra(Similarities):
    """See ``manifold_intra``."""

    weight = INTRA

    def of(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        return manifold_intra(student, teacher)
