"""Photographs in class folders, listed by timm's reader and cut into fixed splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from vitprune_fast.data.augment import Affine, Augment, RandomCrop
from vitprune_fast.data.decode import decode
from vitprune_fast.data.splits import stratified
from vitprune_fast.errors import InvalidInput

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
_HELD_OUT = {"val": "validation", "validation": "validation", "test": "test"}


class Folder:
    """The images of a folder; sample ids count through train, validation, test, or the one folder.

    Args:
        root: ``ROOT/<class>/...`` or ``ROOT/train/<class>/...`` with ``val`` or ``validation``
            and ``test`` beside it.
        image_size: (height, width) of the model's input in pixels.
        channels: 3, or 1 for grey.
        seed: of the splits that have no folder.
        crop_share: share of the shorter side that the centre window of evaluation covers.

    Raises:
        InvalidInput: the folder is missing or empty, or has no classes, one class, an empty one,
            or one that the training part lacks.
    """

    def __init__(
        self, root: Path, image_size: tuple[int, int], channels: int, seed: int, crop_share: float
    ) -> None:
        self.root = root
        self.image_size = image_size
        self.channels = channels
        self.seed = seed
        self.crop_share = crop_share
        # relative to the root, as plain text: a data set may have millions
        self.names: list[str] = []
        self.labels: list[int] = []
        self.classes: tuple[str, ...] = ()
        self.splits = self._list()

    def pixels(self, ids: torch.Tensor, augment: Augment | None, draws: np.ndarray) -> torch.Tensor:
        """Return ``(B, C, H, W)`` fp32 in ``[0, 1]``.

        Raises:
            DamagedFile: an image cannot be read; the message names it.
        """
        images = [
            self._view(self.image(sample), augment, draw)
            for sample, draw in zip(ids.tolist(), draws, strict=True)
        ]
        height, width = self.image_size
        pixels = torch.from_numpy(np.stack(images)).view(-1, height, width, self.channels)
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        return augment(pixels, draws) if isinstance(augment, Affine) else pixels.contiguous()

    def image(self, sample: int) -> Image.Image:
        """Decode one whole image."""
        path = self.path(sample)

        def open_file() -> BinaryIO:
            return open(path, "rb")

        return decode(open_file, path, channels=self.channels)

    def path(self, sample: int) -> str:
        """Where an image lies."""
        return os.path.join(self.root, self.names[sample])

    def _view(self, image: Image.Image, augment: Augment | None, draw: np.ndarray) -> np.ndarray:
        """Cut a window and resize it to the model's input: random, or the centre to evaluate."""
        height, width = self.image_size
        flip = False
        if isinstance(augment, RandomCrop):
            window, flip = augment.window(draw, *image.size)
        else:
            # the largest window of the input's shape, shrunk by crop_share
            share = min(image.width / width, image.height / height) * self.crop_share
            wide, high = width * share, height * share
            left, top = (image.width - wide) / 2, (image.height - high) / 2
            window = (left, top, left + wide, top + high)
        view = image.resize((width, height), Image.Resampling.BICUBIC, box=window)
        return np.asarray(view)[:, ::-1] if flip else np.asarray(view)

    def _list(self) -> dict[str, list[int]]:
        root = self.root
        if not root.is_dir():
            raise InvalidInput(f"open_data: the data folder must exist, got {root}")
        if not (root / "train").is_dir():
            self._add(root)
            shares = {"test": TEST_SHARE, "validation": VALIDATION_SHARE}
            return self._derived(range(len(self.names)), shares)
        splits = {"train": self._add(root / "train")}
        held_out = [name for name in _HELD_OUT if (root / name).is_dir()]
        for name in held_out:
            split = "test" if len(held_out) == 1 else _HELD_OUT[name]
            if split in splits:
                raise InvalidInput(
                    f"open_data: {root} must have one validation folder, got val and validation"
                )
            splits[split] = self._add(root / name)
        shares = {"test": TEST_SHARE, "validation": VALIDATION_SHARE}
        missing = {split: share for split, share in shares.items() if split not in splits}
        return {**splits, **self._derived(splits["train"], missing)}

    def _derived(
        self, samples: range | list[int], shares: dict[str, float]
    ) -> dict[str, list[int]]:
        """Cut ``shares`` out of ``samples``; names and a fixed seed decide, see ``stratified``."""
        names = [self.names[sample] for sample in samples]
        labels = [self.labels[sample] for sample in samples]
        chosen = stratified(names, labels, shares, self.seed)
        return {split: [samples[index] for index in part] for split, part in chosen.items()}

    def _add(self, folder: Path) -> list[int]:
        """Append the images of one folder of classes and return their ids."""
        _check_class_folders(folder)
        try:
            reader = ReaderImageFolder(str(folder))
        except RuntimeError:
            raise InvalidInput(
                f"open_data: {folder} must hold images (.jpg, .jpeg, .png) in class folders, "
                "got none"
            ) from None
        found = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
        if "" in found:
            raise InvalidInput(
                f"open_data: every image must lie in a class folder, got images in {folder} itself"
            )
        if not self.classes:
            self.classes = found
        if len(self.classes) < 2:
            raise InvalidInput(
                f"open_data: {folder} must hold at least two classes (a folder each), "
                f"got {list(found)}"
            )
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise InvalidInput(
                f"open_data: {folder} must have the classes of the training part, "
                f"got also {unknown[:5]}"
            )
        first = len(self.names)
        prefix = os.path.join(self.root, "")
        self.names += [path.removeprefix(prefix) for path, _ in reader.samples]
        self.labels += [self.classes.index(found[label]) for _, label in reader.samples]
        return list(range(first, len(self.names)))


def _check_class_folders(folder: Path) -> None:
    """Refuse a class folder without images: the reader would drop it and number the rest anew."""
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not each.name.startswith(".") and not _has_images(each):
            raise InvalidInput(
                f"open_data: every class folder must hold images, got none in {each}; "
                "fill it or remove it"
            )


def _has_images(folder: Path) -> bool:
    suffixes = get_img_extensions(as_set=True)
    # like the reader, which follows links
    return any(
        Path(name).suffix.lower() in suffixes
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )
