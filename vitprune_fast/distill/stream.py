"""The micro-batches of a training: which step they belong to, and how they are augmented."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast.batches import Batch, Numbered, Targets, alike, classes_of, readable, unpack
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.mixing import Mixing
from vitprune_fast.errors import InvalidInput
from vitprune_fast.precision import device_of
from vitprune_fast.randomness import seeded
from vitprune_fast.ranks import Ranks
from vitprune_fast.transfer import sent

# number in the run of all processes, images, labels
MicroBatch = tuple[int, Tensor, Tensor]


class Stream:
    """This process' micro-batches, each at a place that depends on the seed and its number alone.

    Args:
        train: a `data.Loader`, of which each process reads its own batches; or has a length and
            ``epoch(number, first_batch)``; or is an iterable with a length.
        student: takes the images.
        config: how many micro-batches make a step, and what is mixed and erased.
        ranks: the processes that share them.
        targets: what is read beside the images.

    Attributes:
        train: as given.
        steps_per_epoch: steps in an epoch; the last one may have fewer micro-batches.
        steps: of the whole run.

    Raises:
        InvalidInput: ``train`` is too short, or its labels cannot be mixed.
    """

    def __init__(
        self,
        # iterable; whether it has a length is asked here
        train: Any,
        student: nn.Module,
        config: DistillConfig,
        ranks: Ranks,
        targets: Targets = "labels",
    ) -> None:
        self.train, self._student, self._config, self._ranks = train, student, config, ranks
        self._targets: Targets = targets
        batches = len(train) if hasattr(train, "__len__") else 0
        self._per_epoch = batches // ranks.world
        self.steps_per_epoch = math.ceil(self._per_epoch / config.accumulate)
        if self.steps_per_epoch == 0:
            wanted = f"{ranks.world} batches" if ranks.world > 1 else "one batch"
            hint = "" if hasattr(train, "__len__") else "; of a generator take list(train)"
            got = f"{batches or 'none'}{hint}"
            raise InvalidInput(f"distill: train must have a length of at least {wanted}, got {got}")
        self.steps = self.steps_per_epoch * config.epochs
        self._mixing = _mixing(student, config)

    def check_alike(self) -> None:
        """Refuse a plain iterable that gives another process other batches; all of them call.

        Raises:
            StageFailed: as said.
        """
        if self._ranks.world > 1 and not isinstance(self.train, Numbered):
            batches = _numbered(self.train, self._config.seed, 0, 0)
            seen = (self._unpacked(batch) for _, batch in batches)
            next(alike("distill", self.train, seen, self._ranks), None)

    @cached_property
    def images_per_step(self) -> int:
        """Images of a whole step, of all processes; a plain iterable is read for its first."""
        size = getattr(self.train, "batch_size", None)
        if size is None:
            _, first = next(_numbered(self.train, self._config.seed, 0, 0))
            size = len(self._unpacked(first)[0])
        return size * self._config.accumulate * self._ranks.world

    def epoch(self, epoch: int, first_step: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step of an epoch, from a step on.

        Raises:
            InvalidInput: ``train`` gives fewer batches than its length says.
        """
        first = first_step * self._config.accumulate
        batches = self._own(epoch, first)
        for start in range(first, self._per_epoch, self._config.accumulate):
            wanted = min(self._config.accumulate, self._per_epoch - start)
            step = list(islice(batches, wanted))
            if len(step) < wanted:
                raise InvalidInput(
                    f"distill: train must give {self._per_epoch} batches as its length says, "
                    f"got {start + len(step)}"
                )
            yield step

    def samples(self, epoch: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first samples of an epoch, in batches, as all processes see them."""
        if isinstance(self.train, Numbered):
            found = self._exchanged(self.train, epoch, count)
        else:
            found = (batch for _, batch in _numbered(self.train, self._config.seed, epoch, 0))
        batches: list[tuple[Tensor, Tensor]] = []
        for batch in found:
            images, labels = self._unpacked(batch)
            batches.append((images[:count], labels[:count]))
            count -= len(images)
            if count <= 0:
                break
        return batches

    def varied(self, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images mixed and erased on a device, and labels as they then are.

        Labels without a class are mixed as the nearest one: who trains on them has to refuse them.
        """
        number, images, labels = batch
        images = sent(images, device)
        if self._mixing is None:
            return images, labels
        return self._mixing.varied(number, images, labels)

    def _own(self, epoch: int, first: int) -> Iterator[MicroBatch]:
        """This process' micro-batches of an epoch, from its own number ``first`` on."""
        world, count = self._ranks.world, self._per_epoch * self._ranks.world
        if isinstance(self.train, Numbered):
            numbers = self._ranks.share_of(count, first)
            read = self.train.read(epoch, numbers, device_of(self._student))
            for number, batch in zip(numbers, read, strict=True):
                # of a batch that cannot be read at all the step is left out and counted
                some = bool((batch[2] >= 0).any())
                images, labels = self._unpacked(readable(batch) if some else batch)
                yield epoch * count + number, images, labels
            return
        for number, batch in _numbered(self.train, self._config.seed, epoch, first * world):
            if number >= count:
                return
            if self._ranks.owns(number):
                images, labels = self._unpacked(batch)
                yield epoch * count + number, images, labels

    def _unpacked(self, batch: Any) -> tuple[Tensor, Tensor]:
        return unpack("distill", batch, self._student, targets=self._targets)

    def share(self) -> None:
        """Make the images that any process could not read known to all; all of them call."""
        if isinstance(self.train, Numbered):
            self.train.share(self._ranks)

    def _exchanged(self, train: Numbered, epoch: int, count: int) -> Iterator[Batch]:
        """Batches of an epoch up to so many samples, each read by the process whose it is."""
        sizes = accumulate(len(train.labels(epoch, k)) for k in range(len(train)))
        last = next((k for k, size in enumerate(sizes) if size >= count), len(train) - 1)
        device = device_of(self._student)
        read = train.read(epoch, self._ranks.share_of(last + 1), device)
        for k in range(last + 1):
            batch = next(read) if self._ranks.owns(k) else None
            images, labels, ids = self._ranks.sent_by(k % self._ranks.world, batch, device)
            yield readable((images, labels.cpu(), ids.cpu()))


def _numbered(train: Any, seed: int, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, batch) of an epoch from batch ``start`` on.

    Args:
        train: has ``epoch(number, first_batch)``, or is an iterable with a length.
        seed: of the order and samples of a plain iterable.
        epoch: number of the epoch.
        start: first batch.
    """
    if hasattr(train, "epoch"):
        yield from enumerate(train.epoch(epoch, start), start)
        return
    # a plain loader draws its order and its samples' augmentation from the global generators
    with seeded(seed, "order", epoch):
        iterator = iter(train)
    for index in range(len(train)):
        with seeded(seed, "batch", epoch * len(train) + index):
            batch = next(iterator, None)
        if batch is None:
            return
        if index >= start:
            yield index, batch


def _mixing(student: nn.Module, config: DistillConfig) -> Mixing | None:
    if not config.mixes and not config.erase:
        return None
    classes = classes_of(student)
    if not classes and config.mixes:
        raise InvalidInput(
            "distill: mixup and cutmix must be 0 for a student without num_classes, got "
            f"{config.mixup} and {config.cutmix}"
        )
    return Mixing(config, classes)
