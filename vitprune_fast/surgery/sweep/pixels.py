"""Whether images look like those a model was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...stated import stated_config

# photographs and drawings spread by about a quarter of the range of pixels
_FLAT = 0.08
# resizing overshoots a little, and augmentation may go on
_OUTSIDE = 0.15


class PixelRange:
    """Mean and spread of pixels, by channel, over batches of one channel count."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None
        self._low, self._high = torch.empty(0), torch.empty(0)

    def add(self, found: list[Any]) -> None:
        """What :func:`seen_of` says of some images."""
        count, *values = found
        sums, low, high = (torch.tensor(value, dtype=torch.float64) for value in values)
        if self._sums is None:
            self._sums, self._low, self._high = sums, low, high
        else:
            self._sums += sums
            self._low, self._high = self._low.minimum(low), self._high.maximum(high)
        self._count += count

    def oddity(self, model: nn.Module) -> str:
        """What speaks against the normalisation that the model states; empty where nothing does."""
        stated = stated_config(model)
        if self._sums is None or not all(name in stated for name in ("mean", "std")):
            return ""
        mean, std = (torch.tensor(stated[name], dtype=torch.float64) for name in ("mean", "std"))
        if len(mean) not in (1, len(self._low)):
            return ""
        average, square = self._sums / self._count
        spread = (square - average.square()).clamp(min=0).sqrt() * std
        low, high = self._low * std + mean, self._high * std + mean
        if bool((low < -_OUTSIDE).any() or (high > 1 + _OUTSIDE).any()):
            seen = (
                f"pixels from {float(low.min()):.2f} to {float(high.max()):.2f} instead of 0 to 1"
            )
        elif bool((spread < _FLAT).all()):
            seen = f"pixels that spread by {float(spread.max()):.3f} of their range"
        else:
            return ""
        return (
            f"calibration should be normalised as the model states (mean {_shown(mean)}, "
            f"std {_shown(std)}), which would make {seen}"
        )


def seen_of(images: Tensor) -> list[Any]:
    """Number, sums and sums of squares, smallest and largest by channel, as plain values.

    Args:
        images: ``(B, C, H, W)``, B at least 1, normalised as the model gets them.
    """
    pixels = images.detach().float().cpu().transpose(0, 1).flatten(1)
    sums = torch.stack([pixels.double().sum(1), pixels.double().square().sum(1)])
    low, high = pixels.aminmax(dim=1)
    return [pixels.shape[1], sums.tolist(), low.tolist(), high.tolist()]


def _shown(values: Tensor) -> str:
    return " ".join(f"{value:.3f}" for value in values.tolist())
