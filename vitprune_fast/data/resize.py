"""A window of a resized photograph, with the bits of Pillow, computed without what is around it.

`resize_window` is no op of ``ops``: it has no gradient and no dtype to choose, runs where images
are loaded and nowhere else, and must not follow a backend that was forced for the model's ops.
"""

from __future__ import annotations

import math

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from vitprune_fast._checks import require, require_input
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.data.decode import MAX_PIXELS
from vitprune_fast.data.view import View

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")
}
_OP = "resize_window"
# from 13 on, Pillow resizes the columns first of an image that loses much more height than width
_MAY_START_WITH_COLUMNS = int(PIL.__version__.partition(".")[0]) >= 13


def show(pixels: np.ndarray, view: View, resampling: str) -> np.ndarray:
    """What a view shows of a photograph.

    Args:
        pixels: of the upright photograph, ``(H, W, C)`` uint8, C 1 or 3.
        view: whose border is mirrored or has a value per channel.
        resampling: one of ``INTERPOLATIONS``.

    Returns:
        ``(height, width, C)`` uint8, of the size of the window. Of a photograph that would have
        over 67 million pixels once it is resized, such as one a thousand times as wide as high, the
        window is resized alone, which rounds differently.
    """
    left, top, width, height = view.window
    if 0 <= left <= view.resized[0] - width and 0 <= top <= view.resized[1] - height:
        return _part(pixels, view, view.window, resampling)
    columns, rows = np.arange(left, left + width), np.arange(top, top + height)
    if view.border == "mirror":
        columns, rows = _mirrored(columns, view.resized[0]), _mirrored(rows, view.resized[1])
    x, y = (max(int(places.min()), 0) for places in (columns, rows))
    right, bottom = (
        min(int(places.max()) + 1, end)
        for places, end in zip((columns, rows), view.resized, strict=True)
    )
    part = _part(pixels, view, (x, y, right - x, bottom - y), resampling)
    if view.border == "mirror":
        return part[(rows - y)[:, None], columns - x]
    whole = np.empty((height, width, pixels.shape[2]), np.uint8)
    whole[:] = view.border
    whole[y - top : bottom - top, x - left : right - left] = part
    return whole


def _mirrored(places: np.ndarray, size: int) -> np.ndarray:
    """Where mirrors at the first and the last of ``size`` places show places outside of them."""
    period = max(2 * (size - 1), 1)
    return np.minimum(places % period, period - places % period) if size > 1 else 0 * places


def _part(
    pixels: np.ndarray, view: View, part: tuple[int, int, int, int], resampling: str
) -> np.ndarray:
    """(left, top, width, height) of the resized box."""
    box, resized = view.box, view.resized
    if math.prod(resized) > MAX_PIXELS:
        x, y, right, bottom = box
        across, down = (right - x) / resized[0], (bottom - y) / resized[1]
        left, top = x + part[0] * across, y + part[1] * down
        box = (left, top, min(left + part[2] * across, right), min(top + part[3] * down, bottom))
        resized, part = part[2:], (0, 0, *part[2:])
    return resize_window(torch.from_numpy(pixels), box, resized, part, resampling).numpy()


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
