"""Reads all that a data set has, to see what it sets aside."""

from __future__ import annotations

from vitprune_fast.data import BadImage, ImageData, Loader


def unreadable(data: ImageData, workers: int = 0) -> list[BadImage]:
    """The images that cannot be read, in the order of their ids."""
    for split in ("train", "validation", "test"):
        for _ in Loader(data.split(split), 5, workers=workers):
            pass
    return list(data.set_aside)
