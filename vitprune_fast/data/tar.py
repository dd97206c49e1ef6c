"""Photographs in a tar of class folders: the same classes, names and order as the folder's."""

from __future__ import annotations

import os
from pathlib import Path

from vitprune_fast.data.archive import (
    Archives,
    Member,
    instead_of_images,
    is_image,
    members,
    natural_key,
)
from vitprune_fast.data.photographs import PARTS, Part
from vitprune_fast.errors import InvalidInput


class Tar(Archives):
    """A plain tar that holds ``<class>/...``, or ``train/<class>/...`` with held-out folders.

    All of it may lie in one folder more. ROOT may also be a folder with ``train.tar``, and
    ``val.tar``, ``valid.tar`` or ``validation.tar`` and ``test.tar`` next to it. As with timm's
    readers, a class is named after the folder that holds the image.
    """

    def _parts(self) -> dict[str, Part]:
        self._start()
        if not self.root.is_dir():
            images, folders = self._read(self.root)
            top = _top(images)
            inside = {name: f"{top}{name}/" for name in PARTS}
            if not any(image.name.startswith(inside["train"]) for image in images):
                inside = {"": ""}
            return {
                name: self._part(
                    [image for image in images if image.name.startswith(prefix)],
                    [folder for folder in folders if folder.startswith(prefix)],
                    prefix,
                )
                for name, prefix in inside.items()
                if name in ("", "train") or any(i.name.startswith(prefix) for i in images)
            }
        parts = {}
        for name in PARTS:
            archive = self.root / f"{name}.tar"
            if archive.exists():
                parts[name] = self._part(*self._read(archive), prefix="", shown=f"{name}/")
        if "train" not in parts:
            raise InvalidInput(f"open_data: {self.root} must be a tar or hold train.tar, got none")
        return parts

    def _read(self, archive: Path) -> tuple[list[Member], list[str]]:
        """The images of an archive and the names of its folders."""
        self._archives.append(archive)
        found = list(members(archive))
        images = [each for each in found if not each.is_folder and is_image(each.name)]
        if not images:
            others = (each.name for each in found if not each.is_folder)
            raise InvalidInput(
                f"open_data: {archive} must hold images in class folders, got "
                f"{instead_of_images(others)}"
            )
        return images, [each.name for each in found if each.is_folder]

    def _part(self, images: list[Member], folders: list[str], prefix: str, shown: str = "") -> Part:
        where = f"{self._archives[-1]}{':' + prefix if prefix else ''}"
        _check_folders(images, folders, where)
        images = sorted(images, key=lambda image: natural_key(image.name))
        classes = [os.path.basename(os.path.dirname(image.name[len(prefix) :])) for image in images]
        number = {name: n for n, name in enumerate(sorted(set(classes), key=natural_key))}
        for image in images:
            self._place(image)
        return Part(
            where,
            tuple(number),
            [shown + image.name for image in images],
            [number[name] for name in classes],
        )


def _top(images: list[Member]) -> str:
    """The folder that everything lies in, where there is one with a ``train`` folder."""
    top = images[0].name.partition("/")[0] + "/" if images else ""
    whole = top != "train/" and all(image.name.startswith(top) for image in images)
    return top if whole and any(i.name.startswith(f"{top}train/") for i in images) else ""


def _check_folders(images: list[Member], folders: list[str], where: str) -> None:
    """Refuse a folder without images, as for class folders on disk."""
    filled: set[str] = set()
    for image in images:
        folder = os.path.dirname(image.name)
        while folder and folder not in filled:
            filled.add(folder)
            folder = os.path.dirname(folder)
    hidden = [name for name in folders if os.path.basename(name).startswith(".")]
    for folder in folders:
        if folder not in filled and folder not in hidden:
            raise InvalidInput(
                f"open_data: every folder of {where} must hold images, got none in {folder}; "
                "fill it or remove it"
            )
