"""How many images it takes to see a loss of accuracy."""

from __future__ import annotations

import math

from ..errors import InvalidInput


def images_needed(top1: float, tolerance: float) -> int:
    """The fewest images on which a loss of ``tolerance`` is not smaller than the noise.

    Noise is one standard error of the accuracy of a model that just passes, ``p = top1 -
    tolerance``, so ``n >= p (1 - p) / tolerance^2``. What decides is the difference of two models
    on the same images, and its variance is at most ``q / n``, with ``q`` the share of images on
    which only one of them is right. That is unknown before the search, and costs a second forward
    pass to find out. The rule covers ``q`` up to ``p (1 - p)``: at an accuracy of 80 % and a
    tolerance of a point, changed answers on 17 % of the images. As ``1 - p`` is at least the
    tolerance, the tolerance is never less than about one image.

    Args:
        top1: accuracy of the unpruned model, in [0, 1].
        tolerance: that may be lost, in (0, top1).
    """
    p = top1 - tolerance
    # a quotient that is whole but for rounding counts as whole
    return math.ceil(p * (1 - p) / tolerance**2 * (1 - 1e-12))


def check_images(top1: float, images: int, tolerance: float) -> None:
    """Refuse a tolerance that so many images cannot tell from noise.

    Args:
        top1: accuracy of the unpruned model on them.
        images: how many each candidate is evaluated on.
        tolerance: that may be lost.

    Raises:
        InvalidInput: there are too few images, or the tolerance is not below the accuracy.
    """
    if tolerance >= top1:
        raise InvalidInput(
            f"search: tolerance must be below the model's top-1 of {top1:.4f}, got {tolerance:g}; "
            "train the model first, or lower the tolerance"
        )
    needed = images_needed(top1, tolerance)
    if images < needed:
        enough = next(n / 1000 for n in range(1, 1001) if images_needed(top1, n / 1000) <= images)
        raise InvalidInput(
            f"search: validation must have at least {needed:,} images for a tolerance of "
            f"{tolerance:g} at a top-1 of {top1:.4f}, got {images:,}, where one standard error is "
            f"as large; give more images, or a tolerance of at least {enough:g}"
        )
