"""Photographs in webdataset shards: tars in which ``key.jpg`` and ``key.cls`` make a sample."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vitprune_fast.data.archive import Archives, Member, is_image, members, natural_key
from vitprune_fast.data.photographs import PARTS, Part
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.files import read_json

INFO = ("_info.json", "info.json")
MAX_CLASSES = 1 << 20
_MAX_LABEL_BYTES = 16


class Shards(Archives):
    """One shard, or a folder of them: ``<anything>-train-0000.tar``, as above ``val``, ``test``.

    Each sample is one image and one ``.cls`` file, a number from 0; its class is called by that
    number. Shards whose names tell no split are one data set that is cut like a flat folder.
    The shards' headers are read once, at the start, so that any sample can be read at any time;
    timm's own reader streams, and cannot.

    Where timm's ``_info.json`` lies next to the shards, they must be those it lists; else numbered
    shards must have no gap.
    """

    def _parts(self) -> dict[str, Part]:
        self._start()
        found = self._grouped()
        # a data set has the classes up to its largest label
        listed = {name: self._samples(shards) for name, shards in found.items()}
        count = max(max(labels) for _, labels in listed.values()) + 1
        classes = tuple(str(label) for label in range(count))
        return {
            name: Part(f"{self.root} ({name or 'all'})", classes, *listed[name]) for name in listed
        }

    def _grouped(self) -> dict[str, list[Path]]:
        """The shards of each part, in the order of their numbers."""
        if self.root.is_file():
            return {"": [self.root]}
        shards = sorted(self.root.glob("*.tar"), key=lambda path: natural_key(path.name))
        if not shards:
            raise InvalidInput(f"open_data: {self.root} must hold .tar shards, got none")
        info = next((self.root / name for name in INFO if (self.root / name).is_file()), None)
        if info is None:
            _check_numbers(shards)
        else:
            _check_listed(info, shards)
        groups: dict[str, list[Path]] = {}
        for shard in shards:
            words = re.split(r"[^a-z]+", shard.stem.lower())
            groups.setdefault(next((part for part in PARTS if part in words), ""), []).append(shard)
        if "train" in groups and "" in groups:
            raise InvalidInput(
                f"open_data: every shard of {self.root} must tell its split in its name like "
                f"train-0000.tar, got {groups[''][0].name}"
            )
        if "train" not in groups and set(groups) != {""}:
            raise InvalidInput(
                f"open_data: {self.root} must hold shards to train on, got only "
                f"{', '.join(sorted(groups))}"
            )
        return {part: groups[part] for part in ("", *PARTS) if part in groups}

    def _samples(self, shards: list[Path]) -> tuple[list[str], list[int]]:
        names: list[str] = []
        labels: list[int] = []
        for shard in shards:
            self._archives.append(shard)
            for image, label in _pairs(shard):
                names.append(f"{shard.name}/{image.name}")
                labels.append(label)
                self._place(image)
        if not names:
            raise InvalidInput(f"open_data: {shards[0]} must hold images, got none")
        return names, labels


def _pairs(shard: Path) -> list[tuple[Member, int]]:
    """The images of a shard with their labels, in the order of the images."""
    images: dict[str, Member] = {}
    numbers: dict[str, Member] = {}
    for member in members(shard):
        # as webdataset does: the key ends at the first dot of the file's name
        folder, slash, file = member.name.rpartition("/")
        key, _, extension = file.partition(".")
        kind = numbers if extension == "cls" else images if is_image(member.name) else None
        if member.is_folder or kind is None:
            continue
        if kind.setdefault(folder + slash + key, member) is not member:
            raise DamagedFile(
                f"open_data: {shard} must hold one image and one .cls per sample, "
                f"got two for {key!r}"
            )
    odd = sorted(images.keys() ^ numbers.keys())
    if odd:
        lacks = "a .cls file" if odd[0] in images else "an image"
        raise DamagedFile(
            f"open_data: every sample of {shard} must be an image and its .cls, "
            f"got {odd[0]!r} without {lacks}"
        )
    with open(shard, "rb") as file:
        return [(image, _label(file, numbers[key], shard)) for key, image in images.items()]


def _label(file: Any, member: Member, shard: Path) -> int:
    text = b""
    if member.size <= _MAX_LABEL_BYTES:
        file.seek(member.offset)
        text = file.read(member.size).strip()
    if not re.fullmatch(rb"[0-9]{1,7}", text) or int(text) >= MAX_CLASSES:
        raise DamagedFile(
            f"open_data: a label must be a number below {MAX_CLASSES}, "
            f"got {text!r} in {shard}:{member.name!r}"
        )
    return int(text)


def _check_numbers(shards: list[Path]) -> None:
    """Refuse a gap in the numbers of ``name-0000.tar``, ``name-0001.tar`` ..."""
    last: dict[str, int] = {}
    for shard in shards:
        stem = re.fullmatch(r"(.*\D)(\d+)", shard.stem)
        if stem is None:
            continue
        number = int(stem[2])
        if number != last.get(stem[1], number - 1) + 1:
            raise InvalidInput(
                f"open_data: the shards in {shard.parent} must be numbered without a gap, got "
                f"{shard.name} after number {last[stem[1]]}; the one between is missing"
            )
        last[stem[1]] = number


def _check_listed(info: Path, shards: list[Path]) -> None:
    """Refuse when the shards are not those of timm's list."""
    content = read_json(info)
    try:
        listed = {name for split in content["splits"].values() for name in split["filenames"]}
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedFile(
            f"open_data: {info} must list file names for each of its splits, got {error!r}"
        ) from None
    different = sorted(listed ^ {shard.name for shard in shards}, key=str)
    if different:
        raise InvalidInput(
            f"open_data: the shards next to {info} must be those it lists, "
            f"got a difference in {', '.join(map(str, different[:5]))}"
        )
