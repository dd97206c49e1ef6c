"""Mixup, cutmix and random erasing of a batch: functions of the batch and an explicit generator.

Dimensions: ``B`` images, ``C`` channels or classes, ``H`` x ``W`` pixels.

A training step makes its generator from what the step is, so that any step can be done again::

    draw = np.random.default_rng(derive_seed(seed, "mixing", step))
    images, targets = mixing(erase(images, 0.25, draw), labels, draw)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitprune_fast._checks import require
from vitprune_fast.batches import check_labels
from vitprune_fast.errors import InvalidInput
from vitprune_fast.transfer import sent

Fill = Literal["const", "rand", "pixel"]

# timm's tries for a box that fits
_ATTEMPTS = 10


@dataclass(frozen=True)
class Mixing:
    """Mix image b with image B - 1 - b, and their labels likewise.

    Sources: Zhang et al., "mixup", ICLR 2018 (arXiv:1710.09412), section 2; Yun et al., "CutMix",
    ICCV 2019 (arXiv:1905.04899), eq. 1 and 2. With the numbers that timm's ``Mixup`` draws, images
    and targets are timm's; a batch may be odd, its middle image staying as it is.

    Attributes:
        num_classes: ``C``.
        mixup: alpha of the beta distribution of mixup's share; 0 turns mixup off.
        cutmix: likewise; its share is corrected to the area of the box inside the image.
        prob: probability that a batch (an image, with ``elem``) is mixed at all.
        switch_prob: probability of cutmix where both are on.
        mode: one share and box for the whole ``batch``, or one for each of its images (``elem``).
        label_smoothing: share of a label spread over all classes, ``[0, 1)``.
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "elem"] = "batch"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        rules = {
            "num_classes": (self.num_classes >= 1, "be at least 1"),
            "mixup": (0 <= self.mixup < math.inf, "be at least 0 and finite"),
            "cutmix": (0 <= self.cutmix < math.inf, "be at least 0 and finite"),
            "prob": (0 <= self.prob <= 1, "be in [0, 1]"),
            "switch_prob": (0 <= self.switch_prob <= 1, "be in [0, 1]"),
            "mode": (self.mode in ("batch", "elem"), "be `batch` or `elem`"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "be in [0, 1)"),
        }
        for name, (holds, rule) in rules.items():
            require(holds, "Mixing", name, rule, getattr(self, name))

    def __call__(
        self, images_BCHW: Tensor, labels_B: Tensor, draw: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            images_BCHW: ``(B, C, H, W)`` floating, left as they are.
            labels_B: ``(B,)`` int64 on any device.
            draw: on which alone the mixture depends.

        Returns:
            Mixed images in their dtype, and targets ``(B, C)`` fp32 on their device, whose rows sum
            to 1. A label without a class that is not on the CPU, where a look at it would wait,
            makes its row NaN, and that of the image it is mixed with.

        Raises:
            InvalidInput: images or labels of another form, or labels on the CPU without a class.
        """
        _check_images("Mixing", images_BCHW)
        batch, _, height, width = images_BCHW.shape
        if labels_B.shape != (batch,) or labels_B.is_floating_point():
            raise InvalidInput(
                f"Mixing: labels must be {batch} class numbers, one per image, got "
                f"{tuple(labels_B.shape)} {labels_B.dtype}"
            )
        if labels_B.device.type == "cpu":
            check_labels("Mixing", labels_B, self.num_classes)
        targets = self._smoothed(sent(labels_B, images_BCHW.device))
        if self.mode == "elem":
            return self._each(images_BCHW, targets, draw)
        share, cuts = self._draw_batch(draw)
        if share == 1:
            return images_BCHW, targets
        other = images_BCHW.flip(0)
        if cuts:
            top, bottom, left, right = (int(side) for side in _box(share, height, width, draw))
            mixed = images_BCHW.clone()
            mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            mixed = images_BCHW * share + other * (1 - share)
        return mixed, targets * share + targets.flip(0) * (1 - share)

    def _draw_batch(self, draw: np.random.Generator) -> tuple[float, bool]:
        """The share an image keeps, and whether the rest comes as a box."""
        if not (self.mixup or self.cutmix) or draw.random() >= self.prob:
            return 1.0, False
        cuts = draw.random() < self.switch_prob if self.mixup and self.cutmix else not self.mixup
        alpha = self.cutmix if cuts else self.mixup
        return float(draw.beta(alpha, alpha)), bool(cuts)

    def _each(
        self, images: Tensor, targets: Tensor, draw: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if not (self.mixup or self.cutmix):
            return images, targets
        batch, _, height, width = images.shape
        cuts = np.full(batch, not self.mixup)
        if self.mixup and self.cutmix:
            cuts = draw.random(batch) < self.switch_prob
        # a beta of alpha 0 does not exist, and where it is off it is not asked for
        cut_alpha, mix_alpha = self.cutmix or self.mixup, self.mixup or self.cutmix
        cut, mix = draw.beta(cut_alpha, cut_alpha, batch), draw.beta(mix_alpha, mix_alpha, batch)
        idle = draw.random(batch) >= self.prob
        top, bottom, left, right = _box(cut, height, width, draw)
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        share = np.where(idle, 1, np.where(cuts, kept, mix)).astype(np.float32)
        sides = np.stack([top, bottom, left, right]) * ~idle
        sides = sent(torch.from_numpy(np.vstack([sides, cuts | idle])), images.device)
        pasted = torch.where(_inside(sides[:4], height, width), images.flip(0), images)
        keeps = sent(torch.from_numpy(share), images.device)
        part = keeps.to(images.dtype).view(-1, 1, 1, 1)
        blended = images * part + images.flip(0) * (1 - part)
        # where nothing is blended, a NaN of the other image must not come in as 0 * NaN
        mixed = torch.where(sides[4].bool().view(-1, 1, 1, 1), pasted, blended)
        keeps = keeps.view(-1, 1)
        return mixed, targets * keeps + targets.flip(0) * (1 - keeps)

    def _smoothed(self, labels: Tensor) -> Tensor:
        off = self.label_smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off, device=labels.device)
        rows = labels.long().view(-1, 1)
        # an index out of range would end all work on a GPU
        within = rows.clamp(0, self.num_classes - 1)
        targets.scatter_(1, within, 1 - self.label_smoothing + off)
        return targets.where(within == rows, math.nan)


def erase(
    images_BCHW: Tensor,
    probability: float,
    draw: np.random.Generator,
    *,
    fill: Fill = "pixel",
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_aspect: float = 0.3,
) -> Tensor:
    """Paint over one random rectangle of some images: random erasing, as timm does it.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020 (arXiv:1708.04896),
    algorithm 1. Image b's rectangle depends on ``draw`` and b only.

    Args:
        images_BCHW: ``(B, C, H, W)`` floating, normalised; left as they are.
        probability: that an image is painted, ``[0, 1]``; it stays whole if ten rectangles in a row
            are too large for it.
        draw: on which alone the result depends.
        fill: ``const`` is 0, ``rand`` one normal number per channel, ``pixel`` one per pixel and
            channel, drawn on the images' device.
        min_area: smallest share of the image's area, before it is rounded to pixels.
        max_area: largest.
        min_aspect: smallest height to width; the largest is its inverse.

    Returns:
        Images of the same shape and dtype.

    Raises:
        InvalidInput: no images, or a value outside its range.
    """
    _check_images("erase", images_BCHW)
    areas_hold = 0 < min_area <= max_area <= 1
    require(0 <= probability <= 1, "erase", "probability", "be in [0, 1]", probability)
    require(fill in ("const", "rand", "pixel"), "erase", "fill", "be const, rand or pixel", fill)
    require(areas_hold, "erase", "min_area", f"be in (0, max_area={max_area}]", min_area)
    require(0 < min_aspect <= 1, "erase", "min_aspect", "be in (0, 1]", min_aspect)
    batch, channels, height, width = images_BCHW.shape
    numbers = draw.random((batch, 1 + 4 * _ATTEMPTS))
    tries = numbers[:, 1:].reshape(batch, _ATTEMPTS, 4)
    area = (min_area + (max_area - min_area) * tries[:, :, 0]) * height * width
    aspect = np.exp((2 * tries[:, :, 1] - 1) * -math.log(min_aspect))
    high, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (high < height) & (wide < width)
    first = fits.argmax(1)
    # a share of probability is a share of [0, 1), so 0 paints none and 1 paints all
    rows = np.flatnonzero((numbers[:, 0] < probability) & fits.any(1))
    noise = torch.Generator(images_BCHW.device).manual_seed(int(draw.integers(2**63)))
    if not len(rows):
        return images_BCHW
    high, wide, down, along = (
        each[rows, first[rows]] for each in (high, wide, tries[:, :, 2], tries[:, :, 3])
    )
    top, left = np.floor(down * (height - high + 1)), np.floor(along * (width - wide + 1))
    sides = np.stack([top, top + high, left, left + wide]).astype(np.int64)
    inside = _inside(sent(torch.from_numpy(sides), images_BCHW.device), height, width)
    sizes = {"const": (1, 1, 1), "rand": (channels, 1, 1), "pixel": (channels, height, width)}
    like = {"dtype": images_BCHW.dtype, "device": images_BCHW.device}
    shape = (len(rows), *sizes[fill])
    paint = (
        torch.zeros(shape, **like)
        if fill == "const"
        else torch.randn(shape, generator=noise, **like)
    )
    painted = images_BCHW.clone()
    chosen = sent(torch.from_numpy(rows), images_BCHW.device)
    painted[chosen] = torch.where(inside, paint, images_BCHW[chosen])
    return painted


def _box(share: float | np.ndarray, height: int, width: int, draw: np.random.Generator) -> tuple:
    """Top, bottom, left, right of a box of area ``1 - share`` around a random pixel, clipped."""
    size = np.shape(share) or None
    ratio = np.sqrt(1 - np.asarray(share))
    ends = []
    for side in (height, width):
        cut = (side * ratio).astype(np.int64)
        centre = draw.integers(0, side, size)
        ends += [np.clip(centre - cut // 2, 0, side), np.clip(centre + (cut + 1) // 2, 0, side)]
    return tuple(ends)


def _inside(sides_4B: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in each image's box: ``(B, 1, H, W)`` bool."""
    top, bottom, left, right = (side.view(-1, 1, 1, 1) for side in sides_4B)
    rows = torch.arange(height, device=sides_4B.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=sides_4B.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def _check_images(function: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        shown = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else images
        raise InvalidInput(
            f"{function}: images must be a floating tensor (B, C, H, W), got {shown}"
        )
