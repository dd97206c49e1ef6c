"""Converts the student's images to what a teacher expects: values, channels, size.

Dimensions: ``B`` images, ``C`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_fast.errors import InvalidInput
from vitprune_fast.stated import fixed_size, image_channels, stated_config

_Pair = tuple[Sequence[float] | None, Sequence[float] | None]


class Conversion:
    """``x_T = (x_S * std_S + mean_S - mean_T) / std_T``, channels repeated, resized.

    Affine in the pixels (weights of a resize sum to 1), so it may follow mixup and cutmix.
    Computed in fp32 (fp64 for fp64 images); no step of it waits for the device.

    Args:
        model: the teacher; decides channels and size, and states its mean and std.
        student: mean and std that the images were normalised with; None converts nothing.
        own: mean and std that the teacher wants; None: see ``Teacher``.
        image_size: (height, width) or one number for both; None: see ``Teacher``.
        name: of the teacher, for the error sentences.

    Raises:
        InvalidInput: a value that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        student: _Pair,
        own: _Pair,
        image_size: int | tuple[int, int] | None,
        name: str,
    ) -> None:
        self.name = name
        self.channels = image_channels(model)
        only = fixed_size(model)
        self.image_size = only if image_size is None else _pair(image_size)
        if only not in (None, self.image_size):
            raise InvalidInput(
                f"Teacher: image_size must be {only}, the one size that {name} takes, got "
                f"{self.image_size}"
            )
        self._student_channels = None if student[0] is None else len(student[0])
        self._affine = _affine(student, own, self.channels, _stated(model, self.channels))
        # on a device once, not copied there in every step
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Convert ``(B, C, H, W)`` floating images.

        Raises:
            InvalidInput: not such a tensor, or its channels do not fit.
        """
        x = images_BCHW
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            shown = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(
                f"Teacher: images must be a floating tensor (B, C, H, W), got {shown}"
            )
        if self.channels not in (None, x.shape[1]) and x.shape[1] != 1:
            raise InvalidInput(
                f"Teacher: {self.name} must take the {x.shape[1]} channels of the student's "
                f"images, got a model of {self.channels}"
            )
        x = self._normalised(x if x.dtype == torch.float64 else x.float())
        if self.channels not in (None, x.shape[1]):
            x = x.expand(-1, self.channels, -1, -1)
        if self.image_size not in (None, tuple(x.shape[2:])):
            x = F.interpolate(x, self.image_size, mode="bicubic", antialias=True)
        return x

    def _normalised(self, x: Tensor) -> Tensor:
        if self._affine is None:
            return x
        if self._student_channels not in (1, x.shape[1]):
            raise InvalidInput(
                f"Teacher: student_mean must have {x.shape[1]} values like the channels of the "
                f"images, got {self._student_channels}"
            )
        key = (x.device, x.dtype)
        if key not in self._constants:
            scale, shift = (
                torch.tensor(values, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
                for values in self._affine
            )
            self._constants[key] = (scale, shift)
        scale, shift = self._constants[key]
        return torch.addcmul(shift, x, scale)


def _stated(model: Any, channels: int | None) -> _Pair:
    """Mean and std that a model states of its images, unless they are of other channels."""
    known = stated_config(model)
    mean, std = known.get("mean"), known.get("std")
    # a configuration made for colour says nothing about grey images
    fits = mean is not None and std is not None and {len(mean), len(std)} <= {channels or len(mean)}
    return (mean, std) if fits else (None, None)


def _affine(
    student: _Pair, own: _Pair, channels: int | None, stated: _Pair
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Scale and shift of each channel from the student's to the teacher's normalisation."""
    for names, pair in (("student_mean and student_std", student), ("mean and std", own)):
        if (pair[0] is None) != (pair[1] is None):
            raise InvalidInput(f"Teacher: {names} must be given together, got {pair[0]}, {pair[1]}")
    if student[0] is None:
        if own[0] is not None:
            raise InvalidInput(
                "Teacher: student_mean and student_std must be given to convert to mean and std, "
                "got None"
            )
        return None
    own = own if own[0] is not None else stated if stated[0] is not None else student
    wide = []
    for names, pair in (("student_mean and student_std", student), ("mean and std", own)):
        mean, std = (tuple(float(value) for value in values or ()) for values in pair)
        usable = all(map(math.isfinite, (*mean, *std))) and all(value > 0 for value in std)
        if not usable or len(mean) != len(std) or len(mean) not in (1, channels or len(mean)):
            raise InvalidInput(
                f"Teacher: {names} must be finite, std above 0, with one number per channel of the "
                f"model ({channels or 'unknown'}), got {mean} and {std}"
            )
        wide.append((mean, std))
    count = max(len(mean) for mean, _ in wide)
    columns = [values * (count // len(values)) for pair in wide for values in pair]
    rows = list(zip(*columns, strict=True))
    scale = tuple(std_s / std_t for _, std_s, _, std_t in rows)
    shift = tuple((mean_s - mean_t) / std_t for mean_s, _, mean_t, std_t in rows)
    return None if set(scale) == {1.0} and set(shift) == {0.0} else (scale, shift)


def _pair(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InvalidInput(
            f"Teacher: image_size must be one or two whole numbers above 0, got {size}"
        )
    return pair
