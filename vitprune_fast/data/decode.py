"""From the bytes of one image file to eight-bit pixels, or a sentence why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitprune_fast.errors import DamagedFile, NotEnoughMemory

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# a file of a few kilobytes can claim gigapixels
MAX_PIXELS = 1 << 26
# no photograph has more; a file may have anything behind its image
MAX_IMAGE_BYTES = 1 << 28


class Unreadable(DamagedFile):
    """An image that cannot be read.

    Args:
        name: what an error message calls it.
        reason: why, the same whenever it is tried.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"open_data: image must be readable, got {name}: {reason}")
        self.reason = reason


def decode(
    open_file: Callable[[], BinaryIO],
    name: str,
    *,
    channels: int = 3,
    room: np.ndarray | None = None,
) -> np.ndarray:
    """Decode the first frame of an image, turned upright as its EXIF data says.

    CMYK, palettes and transparency become RGB. Grey of more than eight bits keeps the eight high
    ones: of twelve where no pixel needs more, as cameras and scanners fill 16-bit files, else of
    16. Pillow reads every header, and alone decides what is bad. The pixels of plain JPEGs come
    from simplejpeg where it is installed: the same bits in less time, as it is the same
    libjpeg-turbo.

    Args:
        open_file: opens the file; what it raises counts as the image's fault.
        name: what an error message calls the image.
        channels: 3 gives RGB, 1 gives grey.
        room: flat uint8; pixels may lie in it, where they fit. Memory that is used again costs no
            page faults, a fifth of the time of a photograph.

    Returns:
        ``(H, W, channels)`` uint8, contiguous and writable.

    Raises:
        Unreadable: missing, not readable, truncated, not an image, or over 67 million pixels.
        NotEnoughMemory: it may be as it should.
    """
    try:
        with open_file() as file, warnings.catch_warnings():
            # the limit below comes first, and the rest is not the user's business
            warnings.simplefilter("ignore")
            image = Image.open(file)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            pixels = _plain_jpeg(image, file, channels, room)
            if pixels is None:
                image.load()
                upright = ImageOps.exif_transpose(image)
                pixels = np.array(_eight_bits(upright, "L" if channels == 1 else "RGB"))
            return pixels.reshape(*pixels.shape[:2], channels)
    except MemoryError:
        raise NotEnoughMemory(
            f"open_data: memory must hold the image, got out of memory at {name}; free some, or "
            "give fewer --workers"
        ) from None
    except UnidentifiedImageError:
        # the library's own words have the address of the file object
        raise Unreadable(name, "no image of a known kind") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreadable(name, reason) from None


def _plain_jpeg(
    image: Image.Image, file: BinaryIO, channels: int, room: np.ndarray | None
) -> np.ndarray | None:
    """Pixels as Pillow would give them, or None where Pillow has to do it.

    That is whatever is no JPEG, is to be turned, needs colours made from others, or is not as
    libjpeg wants it: Pillow reads over some damage.
    """
    if simplejpeg is None or image.format not in ("JPEG", "MPO"):
        return None
    if not (image.mode == "L" or (image.mode == "RGB" and channels == 3)):
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    file.seek(0)
    data = file.read(MAX_IMAGE_BYTES + 1)
    if len(data) > MAX_IMAGE_BYTES:
        return None
    try:
        # nothing is allocated for a size that Pillow does not see
        if simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
            return None
        fits = room is not None and room.size >= image.width * image.height * channels
        colours = "RGB" if channels == 3 else "GRAY"
        return simplejpeg.decode_jpeg(data, colours, strict=True, buffer=room if fits else None)
    except MemoryError:
        raise
    except Exception:  # whatever it is, Pillow says whether it matters
        return None


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # convert() would clip everything above 255 to white
        wide = np.asarray(image, dtype=np.int64)
        least, most = int(wide.min()), int(wide.max())
        if least < 0 or most > 0xFFFF:
            raise ValueError(f"pixels from {least} to {most}, more than 16 bits hold")
        white = 0xFFF if most <= 0xFFF else 0xFFFF
        return Image.fromarray((wide * 255 // white).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no fixed range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
