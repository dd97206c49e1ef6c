"""A window of a resized photograph, with the bits of Pillow, computed without what is around it.

This is no op of ``ops``: it has no gradient and no dtype to choose, runs where images are loaded
and nowhere else, and must not follow a backend that was forced for the ops of the model.
"""

from __future__ import annotations

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from vitprune_fast._checks import require, require_input
from vitprune_fast._extension import OBSTACLE

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")
}
_OP = "resize_window"
# from 13 on, Pillow resizes the columns first of an image that loses much more height than width
_MAY_START_WITH_COLUMNS = int(PIL.__version__.partition(".")[0]) >= 13


def resize_window(
    pixels: Tensor,
    box: tuple[float, float, float, float],
    resized: tuple[int, int],
    window: tuple[int, int, int, int],
    resampling: str = "bicubic",
) -> Tensor:
    """Resize a box of an image, and cut a window out of the result.

    Every bit is that of ``image.resize(resized, resampling, box=box).crop(window)`` in the Pillow
    that is installed, which does the work where the native code is not built. Pillow's versions
    agree on all images but those that lose more than twice as many pixels of height as of width:
    since 13.0 the columns of these are resized first. The native code computes only the window, and
    what the filter reads for it, in one thread. The bits do not depend on the instruction set.

    Args:
        pixels: ``(H, W, C)`` uint8 on the CPU, C 1 or 3.
        box: left, top, right and bottom of what is resized, in pixels of the image; need not be
            whole, and is rounded to single precision. The filter sees the pixels around it too.
        resized: width and height that the box is resized to, in pixels.
        window: left, top, width and height of what is returned of that, in its pixels.
        resampling: one of ``INTERPOLATIONS``; ``nearest`` always runs in Pillow.

    Returns:
        ``(height, width, C)`` uint8.

    Raises:
        TypeError: ``pixels`` is not a tensor.
        InvalidInput: ``pixels`` is no such image, the box does not lie inside it or is empty, the
            window does not lie inside ``resized`` or is empty, or no filter has that name.
    """
    require_input(_OP, "pixels", pixels, 3, (torch.uint8,))
    require(pixels.is_cpu, _OP, "pixels", "be on the CPU", pixels.device)
    height, width, channels = pixels.shape
    require(channels in (1, 3), _OP, "pixels", "have 1 or 3 channels", channels)
    left, top, right, bottom = np.asarray(box, np.float32).tolist()
    inside = 0 <= left < right <= width and 0 <= top < bottom <= height
    require(inside, _OP, "box", f"lie inside the image of {width} x {height} pixels", box)
    x, y, wide, high = window
    inside = 0 <= x <= resized[0] - wide and 0 <= y <= resized[1] - high and min(wide, high) >= 1
    require(inside, _OP, "window", f"lie inside the {resized} pixels of the resized box", window)
    names = ", ".join(INTERPOLATIONS)
    require(resampling in INTERPOLATIONS, _OP, "resampling", f"be one of {names}", resampling)
    if OBSTACLE is not None or resampling == "nearest":
        return _by_pillow(pixels, (left, top, right, bottom), resized, window, resampling)
    lost_width, lost_height = width - resized[0], height - resized[1]
    columns_first = _MAY_START_WITH_COLUMNS and lost_height > max(0, 2 * lost_width)
    return torch.ops.vitprune_fast.resize_window(
        pixels.contiguous(), (left, top, right, bottom), resized, window, resampling, columns_first
    )


def _by_pillow(
    pixels: Tensor,
    box: tuple[float, float, float, float],
    resized: tuple[int, int],
    window: tuple[int, int, int, int],
    resampling: str,
) -> Tensor:
    left, top, width, height = window
    image = Image.fromarray(pixels.squeeze(2).numpy())
    whole = image.resize(resized, INTERPOLATIONS[resampling], box=box)
    seen = whole.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(seen)).view(height, width, -1)
