"""Augmentations as functions of an image and of that sample's own uniform numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment

from vitprune_fast.data.view import View
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import seeded

# of the simple random crop, as published
_BORDER = 4


@dataclass(frozen=True)
class Affine:
    """Rotate, scale, stretch, shear and shift each image; what comes in from outside is 0.

    Attributes:
        degrees: rotation, uniform in ``[-degrees, degrees]``.
        scale: factor, ``exp`` of uniform in ``[-scale, scale]``; so is the stretch.
        shear: horizontal shear, uniform in ``[-shear, shear]``.
        shift: shift as a share of the image's size, uniform in ``[-shift, shift]``.
    """

    degrees: float = 12.0
    scale: float = 0.12
    shear: float = 0.15
    shift: float = 0.1

    # uniform numbers one sample needs
    draws = 6

    def __call__(self, images: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
        """Transform ``(B, C, H, W)`` fp32 images by ``(B, 6)`` numbers in ``[0, 1)``, bilinear.

        Image b depends on image b and row b only.
        """
        u = torch.from_numpy(2 * uniforms - 1)
        angle = u[:, 0] * math.radians(self.degrees)
        scale, stretch = torch.exp(u[:, 1] * self.scale), torch.exp(u[:, 2] * self.scale)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shear, shift = u[:, 3] * self.shear * scale, 2 * self.shift * u[:, 4:6]
        rows = [cos * stretch, shear - sin, shift[:, 0], sin, cos / stretch, shift[:, 1]]
        theta = torch.stack(rows, dim=1).view(-1, 2, 3).to(images.dtype)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class RandomCrop:
    """A random window of the photograph, resized to the model's input, mirrored half of the time.

    Attributes:
        scale: smallest share of the photograph's area a window has; the largest is 1.
        ratio: largest stretch of the window's width against its height, and of height against
            width.
        flip: probability of mirroring left and right.
        policy: further changes in the words of timm's ``auto_augment``, such as
            ``rand-m9-mstd0.5-inc1`` (RandAugment of DeiT), ``augmix-m3`` or ``3a`` (3-Augment of
            DeiT III: grey, solarised or blurred); empty for none.
        jitter: brightness, contrast and saturation change by factors from ``1 - jitter`` to
            ``1 + jitter``, after the policy.
        simple: the window is as large as the photograph allows, as the simple random crop of
            Touvron et al., "DeiT III: Revenge of the ViT", ECCV 2022 (arXiv:2204.07118), section 3:
            the shorter side is resized to the input, and the border mirrored by four pixels.
    """

    scale: float = 0.35
    ratio: float = 4 / 3
    flip: float = 0.5
    policy: str = ""
    jitter: float = 0.0
    simple: bool = False

    def __post_init__(self) -> None:
        if self.policy:
            _policy(self.policy)

    @property
    def draws(self) -> int:
        """Uniform numbers one sample needs."""
        return 6 if self.policy or self.jitter else 5

    def view(
        self, photograph: tuple[int, int], size: tuple[int, int], uniforms: np.ndarray
    ) -> tuple[View, bool]:
        """What is shown of a photograph, and whether that is mirrored after :meth:`changed`.

        Args:
            photograph: (width, height) in pixels.
            size: (height, width) of the model's input in pixels.
            uniforms: ``(draws,)`` numbers in ``[0, 1)``, on which alone the view depends.
        """
        height, width = size
        window, mirrored = self.window(uniforms, *photograph)
        if self.simple:
            return _simple_crop(photograph, size, *uniforms[2:4].tolist()), mirrored
        return View(window, (width, height), (0, 0, width, height)), mirrored

    def window(
        self, uniforms: np.ndarray, width: int, height: int
    ) -> tuple[tuple[float, float, float, float], bool]:
        """Choose (left, top, right, bottom) in pixels and whether to mirror, from five numbers."""
        area, ratio, x, y, flip = uniforms[:5].tolist()
        area = width * height * (self.scale + (1 - self.scale) * area)
        ratio = math.exp((2 * ratio - 1) * math.log(self.ratio))
        wide = min(math.sqrt(area * ratio), width)
        high = min(math.sqrt(area / ratio), height)
        left, top = x * (width - wide), y * (height - high)
        return (left, top, left + wide, top + high), flip < self.flip

    def changed(self, pixels: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Apply policy and jitter to a window, by the last of its sample's numbers.

        Args:
            pixels: ``(H, W, C)`` uint8, C 1 or 3.
            uniforms: as above.
        """
        if not (self.policy or self.jitter):
            return pixels
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        # they draw from the global generators of Python, numpy and torch
        with seeded(int(uniforms[5] * 2**53), "policy"):
            changed = image if image.mode == "RGB" else image.convert("RGB")
            if self.policy:
                changed = _policy(self.policy)(changed)
            if self.jitter:
                from torchvision.transforms import ColorJitter

                changed = ColorJitter(self.jitter, self.jitter, self.jitter)(changed)
            if image.mode == "L":
                changed = changed.convert("L")
            return np.array(changed).reshape(pixels.shape)


def _simple_crop(photograph: tuple[int, int], size: tuple[int, int], x: float, y: float) -> View:
    height, width = size
    share = max(width / photograph[0], height / photograph[1])
    whole = zip(photograph, (width, height), strict=True)
    wide, high = (max(round(side * share), least) for side, least in whole)
    left = int(x * (wide + 2 * _BORDER - width + 1)) - _BORDER
    top = int(y * (high + 2 * _BORDER - height + 1)) - _BORDER
    return View((0, 0, *photograph), (wide, high), (left, top, width, height))


@cache
def _policy(words: str) -> Callable[[Image.Image], Image.Image]:
    """timm's transform of that name.

    Raises:
        InvalidInput: there is none.
    """
    # one grey for what comes in from outside, whatever the data set's mean is
    hparams = {"translate_const": 100, "img_mean": (124, 116, 104)}
    kind = words.partition("-")[0]
    makers = {
        "rand": auto_augment.rand_augment_transform,
        "augmix": auto_augment.augment_and_mix_transform,
    }
    maker = makers.get(kind, auto_augment.auto_augment_transform)
    try:
        transform = maker(words, hparams)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"RandomCrop: policy must be words of timm's auto_augment, e.g. rand-m9-mstd0.5-inc1, "
            f"got {words!r}: {error}"
        ) from None
    lists = getattr(transform, "policy", None) or [getattr(transform, "ops", [])]
    for op in (op for each in lists for op in each):
        if getattr(op, "aug_fn", None) is auto_augment.posterize:
            op.aug_fn = _posterized
    return transform


def _posterized(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's op, which may ask for no bits: black. Pillow refuses that since version 13."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


Augment = Affine | RandomCrop
