"""The images of a sweep, as the residual streams of two models at the same place.

They make batches by their places in the stream of all images, whatever the number of processes;
process r of w holds the batches r, r + w, ... alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...batches import Numbered, as_input, readable, unlabelled
from ...errors import InvalidInput
from ...precision import device_of
from ...ranks import Ranks
from ...sealed import as_bytes
from .pixels import PixelRange, seen_of
from .streamed import Streamed

# every tenth image chooses and judges, the others are fitted to
HELD_OUT = 10
# images that go through a branch at once
MICRO_BATCH = 64

Item = TypeVar("Item")


@dataclass
class Batch:
    """The streams ``(B, N, C)`` of a few images, of the dense model and of the smaller one.

    ``image`` is one of them, ``(1, C, H, W)``: all have its size.
    """

    number: int
    dense: Tensor
    small: Tensor
    image: Tensor


class Streams:
    """The streams of all images, before the first branch.

    Batches are put together again, so that results depend on the images and their order alone. An
    image of batches with numbers that cannot be read leaves a hole: all others stay in their
    batches.

    Args:
        calibration: batches of images, whatever else they carry. Of batches with numbers each
            process reads the images that it holds; others are the same in every process.
        dense: the dense model.
        small: the smaller one.
        ranks: the processes that share the images; all of them call whatever exchanges.

    Attributes:
        batches: of this process, in the order of the images; where it has none, one of an image
            of another process, which counts nowhere.
        held_out: number of a batch of any process -> whether it is held out.
        ranks: as given.
        images: how many there were.
        example: the first ``(1, C, H, W)``.
        digest: of all pixels.
        odd: what was odd about them, in words.

    Raises:
        InvalidInput: something else than images of this model, or those of the test split.
        StageFailed: other processes were given another number of images.
    """

    def __init__(self, calibration: Iterable[Any], dense: Streamed, small: Streamed, ranks: Ranks):
        self.batches: list[Batch] = []
        self.ranks = ranks
        self._models = dense, small
        if getattr(getattr(calibration, "images", None), "name", None) == "test":
            raise InvalidInput(
                "prune: calibration must be training images, got the test split; what is fitted to "
                "them cannot be tested on them: give a Loader of the train split"
            )
        numbered = isinstance(calibration, Numbered)
        pieces = self._read(calibration) if numbered else self._picked(calibration)
        kinds, found = [], {}
        for number, (held_out, images) in enumerate(pieces):
            kinds.append(held_out)
            if len(images):
                self._put(number, images)
                digest = hashlib.blake2b(as_bytes(images), digest_size=16).hexdigest()
                found[number] = [len(images), digest, seen_of(images)]
        ranks.agree(
            len(kinds),
            "prune: calibration must give as many batches of "
            f"{MICRO_BATCH} images in every process",
            "give all of them the same images",
        )
        # JSON has words for keys
        every = [json.loads(text).items() for text in ranks.texts(json.dumps(found))]
        seen = sorted((int(number), *facts) for items in every for number, facts in items)
        self._counts = {number: count for number, count, *_ in seen}
        self.held_out = {number: kinds[number] for number in self._counts}
        self.images = sum(self._counts.values())
        self.digest = hashlib.blake2b("".join(d for _, _, d, _ in seen).encode()).hexdigest()
        self.example = torch.empty(0)
        if seen:
            owner = seen[0][0] % ranks.world
            first = [self.batches[0].image] if ranks.rank == owner else None
            (self.example,) = ranks.sent_by(owner, first, device_of(dense.model))
            if not self.batches:
                self._put(ranks.rank, self.example)
        pixels = PixelRange()
        for *_, of_batch in seen:
            pixels.add(of_batch)
        texts = self._too_few(), pixels.oddity(dense.model)
        self.odd = tuple(text for text in texts if text)

    @property
    def can_judge(self) -> bool:
        """Whether there are images to fit to, and others."""
        return len({*self.held_out.values()}) == 2

    def rounds(self) -> Iterator[tuple[Batch | None, list[int]]]:
        """This process' next batch, and the numbers of those that all processes have next."""
        mine = {batch.number: batch for batch in self.batches}
        for start in range(0, max(self.held_out) + 1, self.ranks.world):
            numbers = range(start, start + self.ranks.world)
            own = mine.get(start + self.ranks.rank)
            yield own, [number for number in numbers if number in self.held_out]

    def count(self, *, held_out: bool) -> int:
        """Images that are held out, or are not."""
        return sum(n for number, n in self._counts.items() if self.held_out[number] == held_out)

    def tokens(self) -> int:
        """Tokens, as the stream has them now, of the images that are not held out."""
        fitted = [b for b in self.batches if self.held_out.get(b.number) is False]
        own = sum(batch.dense[..., 0].numel() for batch in fitted)
        return sum(map(int, self.ranks.texts(str(own))))

    def agree(self) -> bool:
        """Whether the streams of both models are the same."""
        differ = any(
            batch.dense.shape != batch.small.shape or not torch.equal(batch.dense, batch.small)
            for batch in self.batches
        )
        return not self.ranks.any(differ)

    def _read(self, calibration: Numbered) -> Iterator[tuple[bool, Tensor]]:
        """Whether each batch is held out, and its images; none of those of other processes."""
        model, none = self._models[0].model, torch.empty(0)
        total = sum(len(calibration.labels(0, k)) for k in range(len(calibration)))
        batches = [*_grouped(range(total), lambda one, other: True)]
        own = [batches[number][1] for number in self.ranks.share_of(len(batches))]
        read = calibration.read(0, own, device_of(model))
        for number, (held_out, _) in enumerate(batches):
            images = none
            if self.ranks.owns(number):
                (found,) = unlabelled("prune", "calibration", [readable(next(read))], model)
                images = as_input(model, found)
            yield held_out, images
        calibration.share(self.ranks)

    def _picked(self, calibration: Iterable[Any]) -> Iterator[tuple[bool, Tensor]]:
        """The same of images that every process has to read."""
        model, none = self._models[0].model, torch.empty(0)
        images = (
            # a view would keep all of its batch in memory
            image.clone()
            for batch in unlabelled("prune", "calibration", calibration, model)
            for image in as_input(model, batch)
        )
        alike = _grouped(images, lambda one, other: one.shape == other.shape)
        for number, (held_out, batch) in enumerate(alike):
            yield held_out, torch.stack(batch) if self.ranks.owns(number) else none

    def _put(self, number: int, images: Tensor) -> None:
        dense, small = (model.stem(images) for model in self._models)
        self.batches.append(Batch(number, dense, small, images[:1].clone()))

    def _too_few(self) -> str:
        if self.can_judge:
            return ""
        return (
            "calibration must hold at least 2 images to refit what stays, one of them held out, "
            f"got {self.images} of which {self.count(held_out=True)} are: this is the plain cut"
        )


def _grouped(
    items: Iterable[Item], alike: Callable[[Item, Item], bool]
) -> Iterator[tuple[bool, list[Item]]]:
    """Whether they are held out, and the items of every batch, in the order they are full in.

    Args:
        items: of the stream.
        alike: whether two of them may be in one batch.
    """
    waiting: dict[bool, list[Item]] = {False: [], True: []}
    count = 0
    for count, item in enumerate(items, 1):
        held_out = count % HELD_OUT == 0
        own = waiting[held_out]
        if own and (len(own) == MICRO_BATCH or not alike(own[0], item)):
            yield held_out, own
            own = waiting[held_out] = []
        own.append(item)
    if count < HELD_OUT and len(waiting[False]) > 1:
        waiting[True].append(waiting[False].pop())
    yield from ((held_out, own) for held_out, own in waiting.items() if own)
