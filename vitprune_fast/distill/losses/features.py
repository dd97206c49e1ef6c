"""Pooled features, the input of the last linear layer; weight 20."""

from __future__ import annotations

from torch import Tensor

from vitprune_fast.distill.losses._base import Comparison, OfFeatures, mean_square


class Features(OfFeatures):
    """Mean squared difference of pooled features.

    Source: Yu and Wu, "A Unified Pruning Framework for Vision Transformers", 2021
    (arXiv:2111.15127), for PVTv2, with the weight.
    """

    weight = 20.0

    def __call__(self, both: Comparison) -> Tensor:
        return mean_square(*both.features())
