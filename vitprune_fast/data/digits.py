"""The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels of 17 grey levels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vitprune_fast.data.augment import Augment, RandomCrop
from vitprune_fast.data.images import Read
from vitprune_fast.data.names import Names
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.files import read_json

SPLIT_FILE = Path(__file__).parents[1] / "splits" / "digits.json"
SPLIT_ORIGINS = {
    "train": "the rest of the digits",
    "validation": "10% of the digits, by the committed list",
    "test": "33% of the digits, by the committed list",
}


class Digits:
    """All digits in memory, enlarged to the size asked for; sample ids are scikit-learn's order.

    Args:
        image_size: (height, width) in pixels.
        channels: 1, or 3 equal ones.
    """

    def __init__(self, image_size: tuple[int, int], channels: int) -> None:
        pixels, labels = load_digits()
        splits = committed_splits(pixels, labels)
        self.splits = {name: torch.tensor(samples) for name, samples in splits.items()}
        self.names = Names(str(index) for index in range(len(labels)))
        self.labels = torch.from_numpy(labels)
        self.classes = tuple(str(digit) for digit in range(10))
        images = torch.from_numpy(pixels)[:, None].float() / 16
        self.interpolation = "none" if image_size == (8, 8) else "bilinear"
        if image_size != (8, 8):
            images = F.interpolate(images, image_size, mode="bilinear", align_corners=False)
        self.images = images.expand(-1, channels, -1, -1)

    def read(self, ids: torch.Tensor, augment: Augment | None, draws: np.ndarray) -> Read:
        """Return ``(B, C, H, W)`` fp32 in ``[0, 1]``; all of them can be read."""
        images = self.images[ids]
        if isinstance(augment, RandomCrop):
            raise InvalidInput("Loader: augment must be None or Affine for the digits")
        return Read(augment(images, draws) if augment else images, {})


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels, ``(1797, 8, 8)`` uint8 of 0 to 16, and the labels, ``(1797,)`` int64.

    Raises:
        InvalidInput: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InvalidInput(
            "open_data: the digits need scikit-learn, which is not installed: "
            "pip install 'vitprune_fast[digits]', or give --data folder:PATH"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.int64)


def content_hash(pixels: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the pixels followed by the labels, a byte each."""
    return hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()


def committed_splits(pixels: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """Read the committed indices of train, validation and test.

    Raises:
        DamagedFile: scikit-learn ships other digits than the splits were made for.
    """
    stored = read_json(SPLIT_FILE)
    if stored["sha256"] != content_hash(pixels, labels):
        raise DamagedFile(
            f"open_data: scikit-learn's digits must have the sha256 in {SPLIT_FILE.name}, "
            f"got {content_hash(pixels, labels)}; install another version of scikit-learn"
        )
    return {name: stored[name] for name in ("train", "validation", "test")}
