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
            skip: a scalar on the device, which is not read; where it is not 0 the average keeps its
                bits, for finite weights that have not moved since the last call. None moves.
        """
        mine, theirs = self.module.state_dict(), model.state_dict()
        if skip is None:
            self.update(model, step)
        elif any(tensor.dtype == torch.bfloat16 for tensor in mine.values()):
            # timm rounds these at random
            before = [tensor.clone() for tensor in mine.values()]
            self.update(model, step)
            for tensor, kept in zip(mine.values(), before, strict=True):
                tensor.copy_(torch.where(skip > 0, kept, tensor))
        else:
            weight = 1.0 - self.get_decay(step)
            # a step left out may have moved buffers, also to NaN, which no weight of 0 takes away
            for name in mine.keys() - dict(self.module.named_parameters(remove_duplicate=False)):
                kept, to = mine.pop(name), theirs.pop(name)
                to = torch.lerp(kept, to, weight) if kept.is_floating_point() else to
                kept.copy_(torch.where(skip > 0, kept, to))
            for dtype in {tensor.dtype for tensor in mine.values()}:
                names = [name for name, tensor in mine.items() if tensor.dtype == dtype]
                share = torch.full((), weight, dtype=dtype, device=skip.device)
                # -0 and not 0, which would make 0 of what is -0 in both
                share.masked_fill_(skip > 0, -0.0)
                torch._foreach_lerp_(
                    [mine[name] for name in names],
                    [theirs[name] for name in names],
                    [share] * len(names),
                )


class EpochAverage(Average):
    """The average that UP-ViT moves once an epoch, quickly at first.

    Source: Yu and Wu, 2021 (arXiv:2111.15127), whose code has this decay.
    """

    def get_decay(self, step: int | None = None) -> float:
        """``(1 + n) / (10 + n)`` for the n-th move, n = 1, 2, ..., at most ``decay``."""
        number = step or 0
        return min(self.decay, (1 + number) / (10 + number))
