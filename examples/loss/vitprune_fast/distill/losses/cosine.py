"""Angle between pooled features, whatever their size."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitprune_fast.distill.losses._base import Comparison, OfFeatures
from vitprune_fast.wide import wide


class Cosine(OfFeatures):
    """Mean of 1 - cos over the images, in [0, 2]; 0 for features of one direction.

    Source: the cosine term of Sanh et al., "DistilBERT", 2019 (arXiv:1910.01108), section 3.
    """

    def __call__(self, both: Comparison) -> Tensor:
        student_BD, teacher_BD = both.features()
        return (1 - cosine_similarity(wide(student_BD), wide(teacher_BD).detach(), dim=1)).mean()
