"""The images of a sweep, as the residual streams of two models at the same place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...batches import as_input, unlabelled
from ...errors import InvalidInput
from ...sealed import as_bytes
from .pixels import PixelRange
from .streamed import Streamed

# every tenth image chooses and judges, the others are fitted to
HELD_OUT = 10
# images that go through a branch at once
MICRO_BATCH = 64


@dataclass
class Batch:
    """The streams ``(B, N, C)`` of a few images, of the dense model and of the smaller one.

    ``image`` is one of them, ``(1, C, H, W)``: all have its size.
    """

    dense: Tensor
    small: Tensor
    held_out: bool
    image: Tensor


class Streams:
    """The streams of all images, before the first branch.

    Batches are put together again, so that results depend on the images and their order alone.

    Args:
        calibration: batches of images, whatever else they carry.
        dense: the dense model.
        small: the smaller one.

    Attributes:
        batches: in the order of the images; those held out apart from the others.
        images: how many there were.
        example: the first ``(1, C, H, W)``.
        digest: of all pixels.
        odd: what was odd about them, in words.
    """

    def __init__(self, calibration: Iterable[Any], dense: Streamed, small: Streamed):
        self.batches: list[Batch] = []
        self.images, self.example = 0, torch.empty(0)
        self._models = dense, small
        if getattr(getattr(calibration, "images", None), "name", None) == "test":
            raise InvalidInput(
                "prune: calibration must be training images, got the test split; what is fitted to "
                "them cannot be tested on them: give a Loader of the train split"
            )
        waiting: dict[bool, list[Tensor]] = {False: [], True: []}
        pixels, digest = PixelRange(), hashlib.blake2b(digest_size=16)
        for batch in unlabelled("prune", "calibration", calibration, dense.model):
            pixels.add(batch)
            for image in as_input(dense.model, batch):
                if not self.images:
                    self.example = image[None].clone()
                self.images += 1
                digest.update(as_bytes(image))
                own = waiting[self.images % HELD_OUT == 0]
                if own and (len(own) == MICRO_BATCH or own[0].shape != image.shape):
                    self._put(own, held_out=own is waiting[True])
                # a view would keep all of its batch in memory
                own.append(image.clone())
        if self.images < HELD_OUT and len(waiting[False]) > 1:
            waiting[True].append(waiting[False].pop())
        for held_out, own in waiting.items():
            self._put(own, held_out=held_out)
        self.digest = digest.hexdigest()
        texts = self._too_few(), pixels.oddity(dense.model)
        self.odd = tuple(text for text in texts if text)

    @property
    def can_judge(self) -> bool:
        """Whether there are images to fit to, and others."""
        return len({batch.held_out for batch in self.batches}) == 2

    def count(self, *, held_out: bool) -> tuple[int, int]:
        """Images and tokens that are held out, or are not."""
        own = [batch.dense for batch in self.batches if batch.held_out == held_out]
        return sum(map(len, own)), sum(stream[..., 0].numel() for stream in own)

    def _put(self, images: list[Tensor], *, held_out: bool) -> None:
        if images:
            together = torch.stack(images)
            dense, small = (model.stem(together) for model in self._models)
            self.batches.append(Batch(dense, small, held_out, together[:1].clone()))
            images.clear()

    def _too_few(self) -> str:
        if self.images >= 2:
            return ""
        return (
            f"calibration must hold at least 2 images to refit what stays, got {self.images}: "
            "this is the plain cut"
        )
