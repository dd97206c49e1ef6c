"""Batches in an order without state: epoch e and batch k are functions of (seed, e, k)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from vitprune_fast.data.augment import Augment
from vitprune_fast.data.images import Images
from vitprune_fast.errors import InvalidInput, VitpruneError
from vitprune_fast.randomness import generator

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Loader:
    """Iterates over a split; the same batches for any number of workers, from any start.

    Args:
        images: the split.
        batch_size: samples per batch.
        shuffle: take the samples in the order of a permutation derived from (seed, epoch);
            otherwise as listed.
        augment: how training changes each image; None for evaluation and scoring.
        seed: the run's seed.
        workers: processes that prepare batches; 0 prepares them in the caller's.
        repeats: how often an image comes, each time augmented again, next to its copies; an epoch
            stays as long, with so many times fewer images, others in each (Hoffer et al., "Augment
            your batch", CVPR 2020, arXiv:1901.09335; DeiT has 3).
        processes: how many take turns in the batches. Copies of an image then go to as many of
            them, as in DeiT, whose epochs are rounded down to 256 images besides.

    Raises:
        InvalidInput: ``batch_size``, ``repeats`` or ``processes`` is below 1, ``workers`` below 0,
            ``repeats`` above 1 in a fixed order, of which every epoch would see the same few
            images, or there are no images.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        workers: int = 0,
        repeats: int = 1,
        processes: int = 1,
    ) -> None:
        counts = {"batch_size": batch_size, "repeats": repeats, "processes": processes}
        for name, count in counts.items():
            if count < 1:
                raise InvalidInput(f"Loader: {name} must be at least 1, got {count}")
        if workers < 0:
            raise InvalidInput(f"Loader: workers must be at least 0, got {workers}")
        if repeats > 1 and not shuffle:
            raise InvalidInput(
                f"Loader: repeats must be 1 without shuffle, which brings the other images, got "
                f"{repeats}"
            )
        self.images = images
        self.repeats = repeats
        self.processes = processes
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.workers = workers
        if len(self) == 0:
            raise InvalidInput(f"Loader: images must be at least one, got none in {images.name}")

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield (images ``(B, C, H, W)`` fp32, labels ``(B,)``, ids ``(B,)`` int64) of one epoch.

        Args:
            epoch: from 0.
            start: the number of batches to leave out; the rest is what it would have been.
        """
        batches = _EpochBatches(self, epoch)
        remaining = range(start, len(self))
        if self.workers == 0:
            for index in remaining:
                yield _unwrap(batches[index])
            return
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=remaining,
            num_workers=min(self.workers, max(len(remaining), 1)),
            # without it a seed for the workers is taken from the global generator
            generator=generator(self.seed, "workers", epoch),
        )
        for batch in loader:
            yield _unwrap(batch)


class _EpochBatches(Dataset):
    """The batches of one epoch by number; what a worker process gets."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        count = len(loader.images)
        self.order = torch.arange(count)
        if loader.shuffle:
            self.order = torch.randperm(count, generator=generator(loader.seed, "order", epoch))
        self.copies: torch.Tensor | None = None
        if loader.repeats > 1:
            self.copies = torch.arange(count) % loader.repeats
            self.order = self.order.repeat_interleave(loader.repeats)[:count]
        self.loader = loader
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def _part(self, index: int) -> slice:
        """Places of a batch in the order of the epoch."""
        size, turns = self.loader.batch_size, self.loader.processes
        first = index // turns * turns * size
        if self.copies is None or first + turns * size > len(self.order):
            return slice(index * size, (index + 1) * size)
        # neighbours go to batches of different processes
        return slice(first + index % turns, first + turns * size, turns)

    def __getitem__(self, index: int) -> Batch | VitpruneError:
        loader = self.loader
        part = self._part(index)
        try:
            return loader.images.batch(
                self.order[part],
                self.epoch,
                augment=loader.augment,
                seed=loader.seed,
                copies=None if self.copies is None else self.copies[part],
            )
        # raised here it would come out of a worker as a page of traceback
        except VitpruneError as error:
            return error


def _unwrap(batch: Batch | list | VitpruneError) -> Batch:
    if isinstance(batch, VitpruneError):
        raise batch
    images, labels, ids = batch
    return images, labels, ids
