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
        # a view, and whether it could be read: what could not is not tried again
        self._views: dict[int, tuple[Tensor, bool]] = {}

    def holds(self, ids: Tensor) -> bool:
        """Whether all of these samples ``(B,)`` are there."""
        return all(sample in self._views for sample in ids.tolist())

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Their pixels ``(B, H, W, C)``, and their ids, -1 where one could not be read."""
        views, readable = zip(*(self._views[sample] for sample in ids.tolist()), strict=True)
        return torch.stack(views), torch.where(torch.tensor(readable), ids, -1)

    def put(self, ids: Tensor, pixels: Tensor, found: Tensor) -> None:
        """Keep views, while there is room.

        Args:
            ids: of the samples ``(B,)``.
            pixels: ``(B, H, W, C)`` uint8; of another dtype they are not kept.
            found: as :meth:`take` gives the ids.
        """
        new = [row for row, sample in enumerate(ids.tolist()) if sample not in self._views]
        # a copy of their own, so that no shared memory of a loader process is held
        kept = pixels[new]
        if not new or pixels.dtype != torch.uint8 or kept.nbytes > self._room:
            return
        self._room -= kept.nbytes
        readable = (found[new] >= 0).tolist()
        views = zip(kept, readable, strict=True)
        self._views.update(zip(ids[new].tolist(), views, strict=True))
