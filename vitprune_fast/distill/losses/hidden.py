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

    def make_projector(self, both: Comparison) -> nn.Module | None:
        return linear_maps(both.states(self.pairs))

    def __call__(self, both: Comparison) -> Tensor:
        pairs = both.states(self.pairs)
        maps = both.projector if isinstance(both.projector, nn.ModuleList) else [None] * len(pairs)
        each = [mean_square(*pair, project) for pair, project in zip(pairs, maps, strict=True)]
        return torch.stack(each).mean()
