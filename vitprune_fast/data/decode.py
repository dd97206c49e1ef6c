"""From the bytes of one image file to eight-bit pixels, or a sentence why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vitprune_fast.errors import DamagedFile

# a file of a few kilobytes can claim gigapixels
MAX_PIXELS = 1 << 26


def decode(open_file: Callable[[], BinaryIO], name: str, *, channels: int = 3) -> Image.Image:
    """Decode the first frame of an image, turned upright as its EXIF data says.

    CMYK, palettes and transparency become RGB; 16-bit grey keeps its eight high bits.

    Args:
        open_file: opens the file; what it raises counts as the image's fault.
        name: what an error message calls the image.
        channels: 3 gives mode ``RGB``, 1 gives ``L``.

    Raises:
        DamagedFile: missing, not readable, truncated, not an image, or over 67 million pixels.
    """
    try:
        with open_file() as file, warnings.catch_warnings():
            # the limit below comes first, and the rest is not the user's business
            warnings.simplefilter("ignore")
            image = Image.open(file)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            image.load()
            return _eight_bits(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DamagedFile(f"decode: image must be readable, got {name}: {reason}") from None


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # convert() would clip everything above 255 to white
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray((wide // 257).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no fixed range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
