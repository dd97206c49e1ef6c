"""One split of a data set: which samples, and how a batch of them is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitprune_fast.data.augment import Augment
from vitprune_fast.data.cache import Cache
from vitprune_fast.data.decode import Unreadable
from vitprune_fast.data.names import Names
from vitprune_fast.data.set_aside import BadImage, SetAside
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import derive_seed, uniforms


class Read(NamedTuple):
    """What was read of some samples.

    Attributes:
        pixels: ``(B, H, W, C)`` uint8, or ``(B, C, H, W)`` fp32 in ``[0, 1]``; 0 where an image
            could not be read.
        bad: place in the batch -> why that image could not be read.
    """

    pixels: Tensor
    bad: dict[int, str]


class Source(Protocol):
    """All samples of a data set; a sample's id is its place in these lists."""

    names: Names
    # (n,) int64
    labels: Tensor
    classes: tuple[str, ...]

    def read(self, ids: Tensor, augment: Augment | None, draws: np.ndarray) -> Read:
        """Read samples ``(B,)``; sample b depends on id and row b of the numbers only."""
        ...


@dataclass(frozen=True)
class Normalisation:
    """How pixels become a model's input.

    Attributes:
        mean: per channel, subtracted from pixels in ``[0, 1]``.
        std: per channel, divides.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` fp32 of pixels as :class:`Read` has them, on their device.

        A division, a difference and a division: the same bits on every device, which one scale and
        one bias would not give.
        """
        if pixels.dtype == torch.uint8:
            # by a number a GPU would multiply with its rounded inverse
            white = torch.tensor(255.0, device=pixels.device)
            pixels = pixels.permute(0, 3, 1, 2).contiguous().float().div_(white)
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels - mean).div_(std)


@dataclass(frozen=True)
class Reader:
    """Reads samples of a split; all that a loader process needs."""

    source: Source
    seed: int = 0
    augment: Augment | None = None

    def __call__(self, ids: Tensor, epoch: int = 0, copies: Tensor | None = None) -> Read:
        """Read samples ``(B,)`` as an epoch shows them; ``copies`` says which copy each row is."""
        return self.source.read(ids, self.augment, self._draws(ids.numpy(), epoch, copies))

    def _draws(self, ids: np.ndarray, epoch: int, copies: Tensor | None) -> np.ndarray:
        """(B, draws) numbers, those of the first copy being those of an image without copies."""
        count = self.augment.draws if self.augment else 0
        draws = uniforms(derive_seed(self.seed, "augment", epoch), ids, count)
        for copy in [] if copies is None else sorted({*copies.tolist()} - {0}):
            own = (copies == copy).numpy()
            seed = derive_seed(self.seed, "augment", epoch, copy)
            draws[own] = uniforms(seed, ids[own], count)
        return draws


@dataclass(frozen=True)
class Images:
    """A map-style split.

    Attributes:
        source: of the images.
        name: ``train``, ``validation`` or ``test``.
        ids: ``(n,)`` int64, each sample's number in the whole data set; of a whole split ascending.
        normalisation: of their pixels.
        set_aside: is told which cannot be read.
        cache: keeps views that are looked at again.
    """

    source: Source = field(repr=False)
    name: str
    ids: Tensor = field(repr=False)
    normalisation: Normalisation
    set_aside: SetAside = field(repr=False)
    cache: Cache = field(repr=False)

    @property
    def labels(self) -> Tensor:
        """``(n,)`` int64, in ``[0, len(classes))``."""
        return self.source.labels[self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, rows: Tensor) -> Images:
        """The samples at places ``(m,)`` of this split, in that order."""
        return replace(self, ids=self.ids[rows])

    def batch(
        self,
        rows: Tensor,
        epoch: int = 0,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        copies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make one batch of images that can all be read.

        Args:
            rows: ``(B,)`` int64 places in this split.
            epoch: with ``seed`` and a sample's id, all its augmentation depends on.
            augment: None shows each image as evaluation sees it.
            seed: the run's seed.
            copies: ``(B,)`` int64, which copy of its image each row is, if an epoch has several;
                every copy is changed on its own.

        Returns:
            Normalised images ``(B, C, H, W)`` fp32, labels ``(B,)`` int64, ids ``(B,)`` int64.

        Raises:
            Unreadable: one of them cannot be, a kind of DamagedFile.
        """
        ids = self.ids[rows]
        pixels, bad = Reader(self.source, seed, augment)(ids, epoch, copies)
        for found in self.named(ids, bad):
            raise Unreadable(found.name, found.reason)
        return self.normalisation(pixels), self.source.labels[ids], ids

    def named(self, ids: Tensor, bad: Mapping[int, str]) -> list[BadImage]:
        """What is said of places in a batch of samples ``(B,)`` that could not be read."""
        samples = {int(ids[row]): reason for row, reason in bad.items()}
        names = self.source.names
        return [BadImage(id, self.name, names[id], reason) for id, reason in samples.items()]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
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
