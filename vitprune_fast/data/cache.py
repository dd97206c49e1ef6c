"""Views of photographs that are looked at again, kept as they were decoded."""

from __future__ import annotations

import torch
from torch import Tensor

# 13,000 views of 224 x 224 pixels
MAX_BYTES = 2 << 30


class Cache:
    """The views of some samples as evaluation sees them: uint8, the first that came.

    Args:
        max_bytes: where it ends to grow.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._room = max_bytes
        # what could not be read is not read again either
        self._views: dict[int, Tensor | None] = {}

    def holds(self, ids: Tensor) -> bool:
        """Whether all of these samples ``(B,)`` are there."""
        return all(sample in self._views for sample in ids.tolist())

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Their pixels ``(B, H, W, C)``, and their ids, -1 where one could not be read."""
        views = [self._views[sample] for sample in ids.tolist()]
        some = next((view for view in views if view is not None), torch.empty(0))
        pixels = torch.stack([torch.zeros_like(some) if view is None else view for view in views])
        readable = torch.tensor([view is not None for view in views])
        return pixels, torch.where(readable, ids, -1)

    def put(self, ids: Tensor, pixels: Tensor, read: Tensor) -> None:
        """Keep what was read, while there is room.

        Args:
            ids: of the samples ``(B,)``.
            pixels: ``(B, H, W, C)`` uint8.
            read: as :meth:`take` gives the ids.
        """
        if pixels.dtype != torch.uint8 or pixels.nbytes > self._room:
            return
        self._room -= pixels.nbytes
        # a copy of its own, so that no shared memory of a loader process is held
        pixels = pixels.clone()
        for sample, view, found in zip(ids.tolist(), pixels, read.tolist(), strict=True):
            self._views.setdefault(sample, view if found >= 0 else None)
