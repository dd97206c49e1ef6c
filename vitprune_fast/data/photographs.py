"""Image files with a class each, wherever they lie: decoded when asked for, in fixed splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from vitprune_fast.data.augment import Affine, Augment, RandomCrop
from vitprune_fast.data.decode import decode
from vitprune_fast.data.images import Read
from vitprune_fast.data.names import Names
from vitprune_fast.data.resize import INTERPOLATIONS
from vitprune_fast.data.splits import stratified
from vitprune_fast.errors import DamagedFile, InvalidInput

SHARES = {"test": 0.2, "validation": 0.1}
_HELD_OUT = {**dict.fromkeys(("val", "valid", "validation"), "validation"), "test": "test"}
PARTS = ("train", *_HELD_OUT)


@dataclass(frozen=True)
class Part:
    """What one listing found.

    Attributes:
        where: the folder or archive, for error messages.
        classes: in the order of the labels.
        names: one per image, all different.
        labels: one per image, in ``[0, len(classes))``.
    """

    where: str
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Sequence[int]


class Photographs(ABC):
    """The images of a data set; sample ids count through its parts in the order of the listing.

    Args:
        root: the folder or archive.
        image_size: (height, width) of the model's input in pixels.
        channels: 3, or 1 for grey.
        seed: of the splits that the data set does not bring.
        crop_share: share of the shorter side that the centre window of evaluation covers.
        interpolation: how images are resized, one of ``INTERPOLATIONS``.

    Raises:
        InvalidInput: nothing is there, or no classes, one class, an empty one, or one that the
            training part lacks.
        DamagedFile: an archive cannot be trusted.
    """

    def __init__(
        self,
        root: Path,
        image_size: tuple[int, int],
        channels: int,
        seed: int,
        crop_share: float,
        interpolation: str,
    ) -> None:
        self.root = root
        self.image_size = image_size
        self.channels = channels
        self.seed = seed
        self.crop_share = crop_share
        self.resampling = INTERPOLATIONS[interpolation]
        # relative to the root
        self.names = Names()
        self.labels = torch.empty(0, dtype=torch.int64)
        self.classes: tuple[str, ...] = ()
        # split -> which folder or share it is, for people
        self.split_origins: dict[str, str] = {}
        self.splits = {
            split: torch.as_tensor(samples) for split, samples in self._cut(self._parts()).items()
        }

    @abstractmethod
    def _parts(self) -> Mapping[str, Part]:
        """List the images: ``train`` and held-out parts by name, or one part without a name."""

    @abstractmethod
    def open(self, sample: int) -> BinaryIO:
        """Open the file of one image. No handle is kept, so processes share none."""

    @abstractmethod
    def path(self, sample: int) -> str:
        """Where an image lies, for people."""

    def read(self, ids: torch.Tensor, augment: Augment | None, draws: np.ndarray) -> Read:
        """Return ``(B, H, W, C)`` uint8, or ``(B, C, H, W)`` fp32 that ``Affine`` moved."""
        pixels = np.zeros((len(ids), *self.image_size, self.channels), np.uint8)
        bad = {}
        for row, (sample, draw) in enumerate(zip(ids.tolist(), draws, strict=True)):
            try:
                view = self._view(self.image(sample), augment, draw)
            except DamagedFile as error:
                bad[row] = str(error).partition(f"{self.path(sample)}: ")[2] or str(error)
            else:
                pixels[row] = np.asarray(view).reshape(pixels.shape[1:])
        read = torch.from_numpy(pixels)
        if isinstance(augment, Affine):
            read = augment(read.permute(0, 3, 1, 2).float() / 255, draws)
        return Read(read, bad)

    def image(self, sample: int) -> np.ndarray:
        """Decode one whole image: ``(H, W, C)`` uint8, see ``decode``."""
        return decode(lambda: self.open(sample), self.path(sample), channels=self.channels)

    def _view(self, pixels: np.ndarray, augment: Augment | None, draw: np.ndarray) -> np.ndarray:
        """Cut a window and resize it to the model's input: random, or the centre to evaluate."""
        image = Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        if isinstance(augment, RandomCrop):
            return np.asarray(augment.view(image, self.image_size, self.resampling, draw))
        height, width = self.image_size
        # the largest window of the input's shape, shrunk by crop_share
        share = min(image.width / width, image.height / height) * self.crop_share
        wide, high = width * share, height * share
        left, top = (image.width - wide) / 2, (image.height - high) / 2
        window = (left, top, left + wide, top + high)
        return np.asarray(image.resize((width, height), self.resampling, box=window))

    def _cut(self, parts: Mapping[str, Part]) -> dict[str, Sequence[int]]:
        if "train" not in parts:
            (only,) = parts.values()
            return self._derived(self._add(only), SHARES, only.where)
        several = [name for name in parts if _HELD_OUT.get(name) == "validation"]
        if len(several) > 1:
            raise InvalidInput(
                f"open_data: {self.root} must have one validation part, got {' and '.join(several)}"
            )
        splits: dict[str, Sequence[int]] = {}
        for name, part in parts.items():
            split, origin = _HELD_OUT.get(name, name), part.where
            if split == "validation" and len(parts) == 2:
                # a single held-out part is what the result is measured on
                split, origin = "test", f"{part.where}, the only part held out"
            splits[split] = self._add(part)
            self.split_origins[split] = origin
        missing = {split: share for split, share in SHARES.items() if split not in splits}
        return {**splits, **self._derived(splits["train"], missing, parts["train"].where)}

    def _derived(
        self, samples: Sequence[int], shares: Mapping[str, float], where: str
    ) -> dict[str, Sequence[int]]:
        """Cut ``shares`` out of ``samples``; names and a fixed seed decide, see ``stratified``."""
        for split, share in shares.items():
            self.split_origins[split] = f"{share:.0%} of {where}"
        self.split_origins["train"] = f"the rest of {where}" if shares else where
        names = [self.names[sample] for sample in samples]
        labels = self.labels[torch.as_tensor(samples)].tolist()
        chosen = stratified(names, labels, shares, self.seed)
        return {split: [samples[index] for index in part] for split, part in chosen.items()}

    def _add(self, part: Part) -> range:
        """Append the images of one part and return their ids."""
        if "" in part.classes:
            raise InvalidInput(
                f"open_data: every image must lie in a class folder, got images in {part.where} "
                "itself"
            )
        if not self.classes:
            self.classes = part.classes
        if len(self.classes) < 2:
            raise InvalidInput(
                f"open_data: {part.where} must hold at least two classes (a folder each), "
                f"got {list(part.classes)}"
            )
        unknown = sorted(set(part.classes) - set(self.classes))
        if unknown:
            raise InvalidInput(
                f"open_data: {part.where} must have the classes of the training part, "
                f"got also {unknown[:5]}"
            )
        first = len(self.names)
        number = {name: label for label, name in enumerate(self.classes)}
        # label of the part -> label of the data set
        labels = torch.tensor([number[name] for name in part.classes])
        self.names = Names.joined(self.names, Names(part.names))
        self.labels = torch.cat([self.labels, labels[torch.as_tensor(part.labels)]])
        return range(first, len(self.names))
