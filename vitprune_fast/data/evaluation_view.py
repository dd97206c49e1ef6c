"""What evaluation shows of a photograph: timm's view, and how Pillow renders it."""

from __future__ import annotations

import math

from PIL import Image

from vitprune_fast.data.decode import MAX_PIXELS
from vitprune_fast.data.view import View

CROP_MODES = ("center", "squash", "border")


def evaluation_view(
    photograph: tuple[int, int],
    image_size: tuple[int, int],
    crop_share: float = 1.0,
    crop_mode: str = "center",
    fill: tuple[int, ...] = (0, 0, 0),
) -> View:
    """What the model is shown of a photograph to measure its accuracy.

    The photograph is resized to a scale of ``floor(image_size / crop_share)`` pixels, of which the
    centre is shown: what ``timm.data.create_transform(is_training=False)`` does. Rendered by
    :func:`show` the pixels are timm's, bit for bit; what timm would resize to no pixel keeps one.

    Args:
        photograph: (width, height) in pixels.
        image_size: (height, width) of the model's input in pixels.
        crop_share: share of the scale that is seen, above 0: timm's ``crop_pct``. Above 1 the image
            is smaller than what is seen, with a black border unless the mode is ``border``.
        crop_mode: ``center`` fits the shorter side to the scale, and what is longer is cut off.
            ``squash`` resizes both sides to it, whatever the photograph's proportions. ``border``
            fits the longer side, and fills the border with ``fill``.
        fill: per channel, in ``[0, 255]``.

    Returns:
        A view of the whole photograph whose window has the model's size.
    """
    width, height = photograph
    wide, high = (max(math.floor(side / crop_share), 1) for side in reversed(image_size))
    if crop_mode == "squash":
        resized = wide, high
    elif crop_mode == "center" and wide == high:
        # torchvision's rule for one number, which cuts off fractions where timm's own rounds
        short = min(width, height)
        resized = int(wide * width / short), int(wide * height / short)
    else:
        fit = min if crop_mode == "center" else max
        ratio = fit(height / high, width / wide)
        resized = max(round(width / ratio), 1), max(round(height / ratio), 1)
    (left, wide), (top, high) = (
        (_start(whole, shown), shown)
        for whole, shown in zip(resized, reversed(image_size), strict=True)
    )
    border = fill if crop_mode == "border" else (0,) * len(fill)
    return View((0, 0, width, height), resized, (left, top, wide, high), border)


def _start(whole: int, shown: int) -> int:
    """Where the centre begins; half a pixel is rounded to even, and down where a border is seen."""
    return -((shown - whole) // 2) if shown > whole else round((whole - shown) / 2)


def show(image: Image.Image, view: View, resampling: Image.Resampling) -> Image.Image:
    """The window of a view, by Pillow.

    Args:
        image: the photograph, upright, mode ``RGB`` or ``L``.
        view: its border has one value per channel.
        resampling: how the box is resized.

    Returns:
        An image of the window's size. Of a photograph that would have over 67 million pixels once
        it is resized, such as one a thousand times as wide as high, the window alone is resized,
        which rounds differently.
    """
    left, top, width, height = view.window
    right, bottom = min(left + width, view.resized[0]), min(top + height, view.resized[1])
    seen = (max(left, 0), max(top, 0), right, bottom)
    part = _resized_part(image, view, seen, resampling)
    if part.size == (width, height):
        return part
    whole = Image.new(image.mode, (width, height), view.border)
    whole.paste(part, (seen[0] - left, seen[1] - top))
    return whole


def _resized_part(
    image: Image.Image,
    view: View,
    part: tuple[int, int, int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    """(left, top, right, bottom) of the resized box."""
    if math.prod(view.resized) <= MAX_PIXELS:
        return image.resize(view.resized, resampling, view.box).crop(part)
    x, y, right, bottom = view.box
    across, down = (right - x) / view.resized[0], (bottom - y) / view.resized[1]
    box = (x + part[0] * across, y + part[1] * down, x + part[2] * across, y + part[3] * down)
    return image.resize((part[2] - part[0], part[3] - part[1]), resampling, box)
