"""Similarities among random tokens of the batch, the third part of manifold; weight 0.2."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.distill.losses.manifold import RANDOM, Similarities, manifold_random


class ManifoldRandom(Similarities):
    """See ``manifold_random``."""

    weight = RANDOM

    def of(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        return manifold_random(student, teacher, generator, self.num_rows)
