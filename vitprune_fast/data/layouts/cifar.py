"""CIFAR-10 and CIFAR-100 in their binary versions.

    cifar-10-batches-bin/{data_batch_1.bin ...,test_batch.bin,batches.meta.txt}
    cifar-100-binary/{train.bin,test.bin,fine_label_names.txt}

A file is a sequence of images: the label (of CIFAR-100 the coarse one, then the fine one, which is
taken), a byte each, then red, green and blue, 32 x 32 bytes each. Labels are the authors' numbers.
The text files have the names of the classes, a line each; without them a class is called by its
number. The Python versions are pickles, which can hold code, and are refused.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vitprune_fast.data.archive import Archives, Member
from vitprune_fast.data.layouts import Layout
from vitprune_fast.data.layouts._tables import rows
from vitprune_fast.data.photographs import Part
from vitprune_fast.errors import DamagedFile, InvalidInput

SIZE = 32
PIXEL_BYTES = 3 * SIZE * SIZE


@dataclass(frozen=True)
class _Version:
    """One of the two data sets.

    Attributes:
        stem: how the names of its archives begin.
        folder: what the binary archive unpacks to.
        train: pattern of the files of the training images, numbered from 1 if there are several.
        test: the file of the test images.
        names: the file with the names of the classes.
        label_bytes: per image; the last one counts.
        pickled: what the Python archive unpacks to, and the files by which it is known.
    """

    stem: str
    folder: str
    train: str
    test: str
    names: str
    label_bytes: int
    pickled: tuple[str, ...]

    def is_in(self, root: Path) -> bool:
        """Whether one of its files lies right in a folder, which is none of class folders."""
        some = any((root / name).is_file() for name in (self.test, self.names))
        return not (root / "train").is_dir() and (some or any(root.glob(self.train)))

    def is_pickled_in(self, root: Path) -> bool:
        """Whether the Python version is there, packed or unpacked."""
        folder, *files = self.pickled
        packed = f"{self.stem}-python.tar.gz"
        return (
            (root.is_file() and root.name == packed)
            or (root / packed).is_file()
            or (root / folder).is_dir()
            or all((root / name).is_file() for name in files)
        )

    def is_packed_in(self, root: Path) -> bool:
        """Whether the binary version is there, packed."""
        return (root.is_file() and root.name == self.packed) or (root / self.packed).is_file()

    @property
    def packed(self) -> str:
        return f"{self.stem}-binary.tar.gz"


VERSIONS = (
    _Version(
        "cifar-10",
        "cifar-10-batches-bin",
        "data_batch_*.bin",
        "test_batch.bin",
        "batches.meta.txt",
        1,
        ("cifar-10-batches-py", "data_batch_1", "batches.meta"),
    ),
    _Version(
        "cifar-100",
        "cifar-100-binary",
        "train.bin",
        "test.bin",
        "fine_label_names.txt",
        2,
        ("cifar-100-python", "train", "meta"),
    ),
)


def _home(root: Path) -> Path | None:
    if any(each.is_in(root) for each in VERSIONS):
        return root
    unpacked = [root / each.folder for each in VERSIONS if (root / each.folder).is_dir()]
    if len(unpacked) == 1:
        return unpacked[0]
    known = any(each.is_packed_in(root) or each.is_pickled_in(root) for each in VERSIONS)
    return root if unpacked or known else None


class Cifar(Archives):
    """Its train and test images, each a few bytes of a file."""

    def open(self, sample: int) -> BinaryIO:
        """Make an image file, in the format PPM, of the bytes of one image."""
        planes = np.frombuffer(super().open(sample).read(), np.uint8).reshape(3, SIZE, SIZE)
        return io.BytesIO(b"P6 %d %d 255\n" % (SIZE, SIZE) + planes.transpose(1, 2, 0).tobytes())

    def _parts(self) -> dict[str, Part]:
        self._start()
        versions = [each for each in VERSIONS if each.is_in(self.root)]
        if len(versions) != 1:
            raise _refusal(self.root)
        (version,) = versions
        count = max(len([*self.root.glob(version.train)]), 1)
        train = [self.root / version.train.replace("*", str(n)) for n in range(1, count + 1)]
        test = self.root / version.test
        for file in (*train, test):
            if not file.is_file():
                raise InvalidInput(
                    f"open_data: {self.root} must hold {version.train} and {version.test}, got no "
                    f"{file.name}; unpack {version.packed} again"
                )
        listed = {"train": self._images(train, version), "test": self._images([test], version)}
        classes = self._classes(version, max(max(labels) for _, labels in listed.values()))
        where = {"train": self.root / version.train, "test": test}
        return {name: Part(str(where[name]), classes, *listed[name]) for name in listed}

    def _images(self, files: list[Path], version: _Version) -> tuple[list[str], list[int]]:
        names: list[str] = []
        labels: list[int] = []
        record = version.label_bytes + PIXEL_BYTES
        for file in files:
            size = file.stat().st_size
            if size == 0 or size % record:
                raise DamagedFile(
                    f"open_data: {file} must hold whole images of {record} bytes, got {size} "
                    f"bytes; unpack {version.packed} again"
                )
            self._archives.append(file)
            table = np.memmap(file, np.uint8, "r").reshape(-1, record)
            labels += table[:, version.label_bytes - 1].tolist()
            for row in range(len(table)):
                name = f"{file.name}/{row}"
                names.append(name)
                self._place(Member(name, False, row * record + version.label_bytes, PIXEL_BYTES))
        return names, labels

    def _classes(self, version: _Version, largest: int) -> tuple[str, ...]:
        """The names in the order of the labels."""
        table = self.root / version.names
        if not table.is_file():
            return tuple(str(label) for label in range(largest + 1))
        classes = tuple(" ".join(row) for row in rows(table, None, 1))
        if largest >= len(classes) or len({*classes}) < len(classes):
            raise DamagedFile(
                f"open_data: {table} must have another name for every label up to {largest}, got "
                f"{len({*classes})} names; unpack {version.packed} again"
            )
        return classes


def _refusal(root: Path) -> InvalidInput:
    """Why there is no data set to read."""
    there = [each for each in VERSIONS if each.is_in(root) or (root / each.folder).is_dir()]
    if len(there) > 1:
        return InvalidInput(
            f"open_data: {root} must be one data set, got {' and '.join(v.stem for v in there)}; "
            "name a folder that holds one of them"
        )
    for version in VERSIONS:
        if version.is_packed_in(root):
            return InvalidInput(
                f"open_data: {root} must hold {version.folder}, got {version.packed}; unpack it"
            )
        if version.is_pickled_in(root):
            return InvalidInput(
                f"open_data: {root} must hold the binary version of CIFAR, got that for Python, "
                f"pickles, which can hold code and are never opened; take {version.packed}"
            )
    return InvalidInput(
        f"open_data: {root} must hold the .bin files of CIFAR, got none; unpack its archive again"
    )


LAYOUT = Layout(_home, Cifar)
