"""One split of a data set: which samples, and how a batch of them is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from vitprune_fast.data.augment import Augment
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import derive_seed, uniforms


class Source(Protocol):
    """All samples of a data set; a sample's id is its place in these lists."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def pixels(self, ids: torch.Tensor, augment: Augment | None, draws: np.ndarray) -> torch.Tensor:
        """Return ``(B, C, H, W)`` fp32 in ``[0, 1]``; sample b depends on id and draws b only."""
        ...


class Images:
    """A map-style split.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        ids: ``(n,)`` int64, each sample's number in the whole data set; of a whole split ascending.
        labels: ``(n,)`` int64, in ``[0, len(classes))``.
        mean: per channel, subtracted from pixels in ``[0, 1]``.
        std: per channel, divides.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        ids: Sequence[int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.source = source
        self.name = name
        self.ids = torch.tensor(ids, dtype=torch.int64)
        self.labels = torch.tensor([source.labels[sample] for sample in ids], dtype=torch.int64)
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.ids)

    def batch(
        self,
        rows: torch.Tensor,
        epoch: int = 0,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        copies: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make one batch.

        Args:
            rows: ``(B,)`` int64 places in this split.
            epoch: with ``seed`` and a sample's id, all its augmentation depends on.
            augment: None shows each image as evaluation sees it.
            seed: the run's seed.
            copies: ``(B,)`` int64, which copy of its image each row is, if an epoch has several;
                every copy is changed on its own.

        Returns:
            Normalised images ``(B, C, H, W)`` fp32, labels ``(B,)`` int64, ids ``(B,)`` int64.
        """
        ids = self.ids[rows]
        draws = self._draws(ids.numpy(), epoch, augment, seed, copies)
        pixels = self.source.pixels(ids, augment, draws)
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (pixels - mean) / std, self.labels[rows], ids

    @staticmethod
    def _draws(
        ids: np.ndarray, epoch: int, augment: Augment | None, seed: int, copies: torch.Tensor | None
    ) -> np.ndarray:
        """(B, draws) numbers, those of the first copy being those of an image without copies."""
        count = augment.draws if augment else 0
        draws = uniforms(derive_seed(seed, "augment", epoch), ids, count)
        for copy in [] if copies is None else sorted({*copies.tolist()} - {0}):
            own = (copies == copy).numpy()
            draws[own] = uniforms(derive_seed(seed, "augment", epoch, copy), ids[own], count)
        return draws

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one image as evaluation sees it, ``(C, H, W)`` fp32, and its label."""
        images, labels, _ = self.batch(torch.tensor([range(len(self))[index]]))
        return images[0], int(labels[0])


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    """Refuse a mean or std that does not fit the channels."""
    for name, values in (("mean", mean), ("std", std)):
        usable = all(math.isfinite(value) and (name == "mean" or value > 0) for value in values)
        if len(values) != channels or not usable:
            raise InvalidInput(
                f"open_data: {name} must have {channels} "
                f"{'positive ' if name == 'std' else ''}finite numbers, got {values}"
            )
