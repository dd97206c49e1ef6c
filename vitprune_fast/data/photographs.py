"""Image files with a class each, wherever they lie: decoded when asked for, in fixed splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vitprune_fast.data.augment import Affine, Augment, RandomCrop
from vitprune_fast.data.decode import Unreadable, decode
from vitprune_fast.data.evaluation_view import evaluation_view
from vitprune_fast.data.images import Read
from vitprune_fast.data.names import Names
from vitprune_fast.data.resize import show
from vitprune_fast.data.splits import in_words, stratified, validation_counts
from vitprune_fast.errors import InvalidInput

TEST_SHARE = 0.2
_HELD_OUT = {**dict.fromkeys(("val", "valid", "validation"), "validation"), "test": "test"}
PARTS = ("train", *_HELD_OUT)
# bytes: most photographs fit
_ROOM = 1 << 22


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
        validation: how much is cut out for that split, see ``open_data``.
        crop_share: as for ``evaluation_view``.
        crop_mode: as there.
        fill: per channel, what evaluation shows around a photograph that leaves a border.
        interpolation: how images are resized, one of ``INTERPOLATIONS``.

    Attributes:
        own_splits: those that the data set brings, and which are not cut out of others.

    Raises:
        InvalidInput: nothing is there, or no classes, one class, an empty one, or one that the
            training part lacks; or ``validation`` is given and cannot be had.
        DamagedFile: an archive cannot be trusted.
    """

    def __init__(
        self,
        root: Path,
        image_size: tuple[int, int],
        channels: int,
        *,
        seed: int,
        validation: float | None,
        crop_share: float,
        crop_mode: str,
        fill: tuple[int, ...],
        interpolation: str,
    ) -> None:
        self.root = root
        self.image_size = image_size
        self.channels = channels
        self.seed = seed
        self.validation = validation
        self.crop_share = crop_share
        self.crop_mode = crop_mode
        self.fill = fill
        self.interpolation = interpolation
        # relative to the root
        self.names = Names()
        self.labels = torch.empty(0, dtype=torch.int64)
        self.classes: tuple[str, ...] = ()
        # split -> which folder or share it is, for people
        self.split_origins: dict[str, str] = {}
        self.own_splits: frozenset[str] = frozenset()
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
        bad, room = {}, np.empty(_ROOM, np.uint8)
        for row, (sample, draw) in enumerate(zip(ids.tolist(), draws, strict=True)):
            try:
                view = self._view(self.image(sample, room), augment, draw)
            except Unreadable as error:
                bad[row] = error.reason
            else:
                pixels[row] = view
        read = torch.from_numpy(pixels)
        if isinstance(augment, Affine):
            read = augment(read.permute(0, 3, 1, 2).float() / 255, draws)
        return Read(read, bad)

    def image(self, sample: int, room: np.ndarray | None = None) -> np.ndarray:
        """Decode one whole image: ``(H, W, C)`` uint8, see ``decode``."""
        path, channels = self.path(sample), self.channels
        return decode(lambda: self.open(sample), path, channels=channels, room=room)

    def _view(self, pixels: np.ndarray, augment: Augment | None, draw: np.ndarray) -> np.ndarray:
        """Show a photograph in the size of the model's input: at random, or as evaluation does."""
        size = pixels.shape[1], pixels.shape[0]
        if not isinstance(augment, RandomCrop):
            view = evaluation_view(
                size, self.image_size, self.crop_share, self.crop_mode, self.fill
            )
            return show(pixels, view, self.interpolation)
        view, mirrored = augment.view(size, self.image_size, draw)
        shown = augment.changed(show(pixels, view, self.interpolation), draw)
        # numpy would copy pixel by pixel
        return torch.from_numpy(shown).flip(1).numpy() if mirrored else shown

    def _cut(self, parts: Mapping[str, Part]) -> dict[str, Sequence[int]]:
        if "train" not in parts:
            (only,) = parts.values()
            return self._derived(self._add(only), ("test", "validation"), only.where)
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
        if self.validation is not None and "validation" in splits:
            raise InvalidInput(
                f"open_data: validation must be unset for {self.root}, which has a validation part "
                f"of its own, got {self.validation:g}"
            )
        self.own_splits = frozenset(splits)
        missing = [split for split in ("test", "validation") if split not in splits]
        return {**splits, **self._derived(splits["train"], missing, parts["train"].where)}

    def _derived(
        self, samples: Sequence[int], missing: Sequence[str], where: str
    ) -> dict[str, Sequence[int]]:
        """Cut splits out of ``samples``; names and a fixed seed decide, see ``stratified``."""
        names = [self.names[sample] for sample in samples]
        labels = self.labels[torch.as_tensor(samples)].tolist()
        sizes = Counter(labels)
        amounts: dict[str, float | Mapping[int, int]] = {}
        for split in missing:
            if split == "test":
                amounts[split], words = TEST_SHARE, in_words(TEST_SHARE)
            else:
                amounts[split], words = validation_counts(sizes, self.validation)
            self.split_origins[split] = f"{words} of {where}"
        self.split_origins["train"] = f"the rest of {where}" if missing else where
        chosen = stratified(names, labels, amounts, self.seed)
        wanted = self.validation or 0
        if 1 <= wanted != len(chosen["validation"]):
            raise InvalidInput(
                f"open_data: validation must leave every class of {where} an image to train on, "
                f"got {wanted:,.0f} of its {len(samples):,} images; take fewer"
            )
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
