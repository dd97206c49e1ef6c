"""Pooled features, the input of the last linear layer; weight 20."""

from __future__ import annotations

from torch import Tensor, nn

from vitprune_fast.distill.losses._base import Comparison, Loss, Reads, linear_maps, mean_square


class Features(Loss):
    """Mean squared difference of pooled features.

    Source: Yu and Wu, "A Unified Pruning Framework for Vision Transformers", 2021
    (arXiv:2111.15127), for PVTv2, with the weight.
    """

    weight = 20.0

    def reads(self) -> tuple[Reads, Reads]:
        return Reads(features=True), Reads(features=True)

    def make_projector(self, both: Comparison) -> nn.Module | None:
        made = linear_maps([both.features()])
        return None if made is None else made[0]

    def __call__(self, both: Comparison) -> Tensor:
        return mean_square(*both.features(), both.projector)
