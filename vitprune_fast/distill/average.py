"""The average of the weights of a training."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class Average(ModelEmaV3):
    """timm's moving average, which a flag on the device may keep as it is."""

    @torch.no_grad()
    def take(self, model: nn.Module, step: int, skip: Tensor | None = None) -> None:
        """Move towards the weights of ``model``.

        Args:
            model: of the modules of the averaged one.
            step: steps done, for the warm-up of the decay.
            skip: a scalar on the device; where it is not 0 the average keeps its bits. It is not
                read, for the price of a copy of the average for a moment. None moves.
        """
        mine = list(self.module.state_dict().values())
        before = [] if skip is None else [tensor.clone() for tensor in mine]
        self.update(model, step)
        if skip is not None:
            for tensor, kept in zip(mine, before, strict=True):
                tensor.copy_(torch.where(skip > 0, kept, tensor))
