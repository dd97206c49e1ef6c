"""Photographs in class folders, listed by timm's reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from vitprune_fast.data.photographs import PARTS, Part, Photographs
from vitprune_fast.errors import InvalidInput


class Folder(Photographs):
    """``ROOT/<class>/...``, or ``ROOT/train/<class>/...`` with held-out folders next to it."""

    def open(self, sample: int) -> BinaryIO:
        """Open the file of one image."""
        # a pipe would have its reader wait for a writer
        return open(self.path(sample), "rb", opener=_at_once)

    def path(self, sample: int) -> str:
        """Where an image lies."""
        return os.path.join(self.root, self.names[sample])

    def _parts(self) -> dict[str, Part]:
        root = self.root
        if not root.is_dir():
            raise InvalidInput(f"open_data: the data folder must exist, got {root}")
        if not (root / "train").is_dir():
            return {"": self._listed(root)}
        return {name: self._listed(root / name) for name in PARTS if (root / name).is_dir()}

    def _listed(self, folder: Path) -> Part:
        _check_class_folders(folder)
        try:
            reader = ReaderImageFolder(str(folder))
        except RuntimeError:
            raise InvalidInput(
                f"open_data: {folder} must hold images (.jpg, .jpeg, .png) in class folders, "
                "got none"
            ) from None
        except ValueError as error:
            # the reader sorts names by their numbers and takes a superscript for one
            raise InvalidInput(
                f"open_data: names in {folder} must have plain digits, got {error}; rename the file"
            ) from None
        classes = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
        prefix = os.path.join(self.root, "")
        names = [path.removeprefix(prefix) for path, _ in reader.samples]
        return Part(str(folder), classes, names, [label for _, label in reader.samples])


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_class_folders(folder: Path) -> None:
    """Refuse a class folder without images: the reader would drop it and renumber the rest."""
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not each.name.startswith(".") and not _has_images(each):
            raise InvalidInput(
                f"open_data: every class folder must hold images, got none in {each}; "
                "fill it or remove it"
            )


def _has_images(top: Path) -> bool:
    """Whether the reader will find images; refuses what it would silently skip or never end on."""
    suffixes = get_img_extensions(as_set=True)
    found = False
    # like the reader, which follows links
    for folder, inner, names in os.walk(top, followlinks=True, onerror=_refuse_unreadable):
        found = found or any(Path(name).suffix.lower() in suffixes for name in names)
        for path in (os.path.join(folder, name) for name in inner):
            if os.path.islink(path) and _above(path, folder, top):
                raise InvalidInput(
                    f"open_data: links must not lead in a circle, got {path}; remove it"
                )
    return found


def _above(link: str, folder: str, top: Path) -> bool:
    """Whether ``link``, found in ``folder``, leads to a folder on the way to it."""
    walked = [Path(folder), *(each for each in Path(folder).parents if each.is_relative_to(top))]
    way = {place for each in walked for place in (each.resolve(), *each.resolve().parents)}
    return Path(link).resolve() in way


def _refuse_unreadable(error: OSError) -> None:
    raise InvalidInput(
        f"open_data: every folder must be readable, got {error.filename}: {error.strerror}; "
        "fix its permission"
    )
