"""Block outputs, by a linear map where widths differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprune_fast.distill.losses._base import Comparison, OfBlocks, linear_maps, mean_square


class Hidden(OfBlocks):
    """Mean squared difference of hidden states, averaged over the compared pairs of blocks.

    ``(1 / pairs) * sum_pairs mean((x_S - x_T)^2)`` over images, tokens and channels. Source: Hou et
    al., "DynaBERT: Dynamic BERT with Adaptive Width and Depth", NeurIPS 2020 (arXiv:2004.04037),
    the hidden states' term.
    """

    def make_projectors(self, both: Comparison) -> nn.ModuleList | None:
        return linear_maps(both.states(self.pairs))

    def __call__(self, both: Comparison) -> Tensor:
        return torch.stack([mean_square(*pair) for pair in both.states(self.pairs)]).mean()
