"""A model and photographs that take no time, for tests of what is around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}


def words(sizes: dict[str, Any]) -> list[str]:
    """Options of the command line for this model with these arguments."""
    return ["--model", NAME, "--model-args", *(f"{key}={value}" for key, value in sizes.items())]


def photographs(
    top: Path,
    *parts: str,
    classes: tuple[str, ...] = ("ant", "bee"),
    count: int = 10,
    size: tuple[int, int] = (16, 16),
) -> Path:
    """Folders of classes in each part of ``top``, or in itself; ``count`` images in every class."""
    for part in parts or ("",):
        for label, name in enumerate(classes):
            (top / part / name).mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", size, (80 * label, 12 * index, len(part)))
                image.save(top / part / name / f"{index}.png")
    return top
