"""What evaluation shows of a photograph: timm's view."""

from __future__ import annotations

import math

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
    centre is shown: what ``timm.data.create_transform(is_training=False)`` does. What
    `resize.show` makes of it is timm's, bit for bit; what timm would resize to no pixel keeps one.

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
