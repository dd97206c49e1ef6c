"""Photographs in class folders: the classes, names and order that timm's reader gives them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from vitprune_fast.data.archive import instead_of_images, is_image, natural_key
from vitprune_fast.data.photographs import PARTS, Part, Photographs
from vitprune_fast.errors import InvalidInput
from vitprune_fast.files import open_regular


class Folder(Photographs):
    """``ROOT/<class>/...``, or ``ROOT/train/<class>/...`` with held-out folders next to it."""

    def open(self, sample: int) -> BinaryIO:
        """Open the file of one image."""
        return open_regular(self.path(sample))

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

    def _listed(self, folder: Path, *, by_top: bool = False) -> Part:
        """List class folders in one walk, which follows links.

        timm's reader would drop a class without images and number the rest anew, and never end on
        links in a circle; both are refused.

        Args:
            folder: what holds the class folders.
            by_top: name a class after the folder right below ``folder``, not after the one that
                holds the image.
        """
        prefix = os.path.join(self.root, "")
        names: list[str] = []
        class_of: dict[str, str] = {}
        tops: set[str] = set()
        filled: set[str] = set()
        others: dict[str, set[str]] = {}
        for place, inner, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
            _refuse_circles(place, inner, folder)
            below = Path(place).relative_to(folder).parts
            if not below:
                tops = {each for each in inner if not each.startswith(".")}
            images = [each for each in files if is_image(each)]
            if not images:
                shown = (each for each in files if not each.startswith("."))
                others.setdefault((*below, "")[0], set()).update(shown)
            else:
                short = os.path.join(place, "").removeprefix(prefix)
                class_of[short] = below[0 if by_top else -1] if below else ""
                filled |= {*below[:1]}
                names += [short + image for image in images]
        for empty in sorted(tops - filled):
            raise InvalidInput(
                f"open_data: every class folder must hold images, got "
                f"{instead_of_images(others[empty], f' in {folder / empty}')}; fill it or remove it"
            )
        if not names:
            raise InvalidInput(
                f"open_data: {folder} must hold images in class folders, got "
                f"{instead_of_images(set().union(*others.values()))}"
            )
        names.sort(key=natural_key)
        number = {each: n for n, each in enumerate(sorted({*class_of.values()}, key=natural_key))}
        labels = [number[class_of[name[: name.rfind(os.sep) + 1]]] for name in names]
        return Part(str(folder), tuple(number), names, labels)


def _refuse_circles(place: str, inner: list[str], top: Path) -> None:
    """Refuse links from ``place`` to a folder on the way to it."""
    for link in (os.path.join(place, name) for name in inner):
        if os.path.islink(link):
            walked = (Path(place), *Path(place).parents)
            inside = [each.resolve() for each in walked if each.is_relative_to(top)]
            if Path(link).resolve() in {up for each in inside for up in (each, *each.parents)}:
                raise InvalidInput(
                    f"open_data: links must not lead in a circle, got {link}; remove it"
                )


def _refuse_unreadable(error: OSError) -> None:
    raise InvalidInput(
        f"open_data: every folder must be readable, got {error.filename}: {error.strerror}; "
        "fix its permission"
    )
