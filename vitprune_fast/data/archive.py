"""Images inside tar files: listed once, then read by position, never unpacked.

timm has readers for such files, but the one for class folders keeps a handle that forked workers
would share and may read a pickled index, and the one for shards is a stream that cannot start in
the middle. So the headers are read here, under rules for files that anyone may have written.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from timm.data.readers.img_extensions import get_img_extensions

from vitprune_fast.data.decode import MAX_IMAGE_BYTES
from vitprune_fast.data.photographs import Photographs
from vitprune_fast.errors import DamagedFile, InvalidInput

# a long name or an extended header is data the tar reader takes into memory
MAX_HEADER_BYTES = 1 << 20
MAX_NAME = 4096
SUFFIXES = {*get_img_extensions(as_set=True), ".tif", ".tiff"}
"""How names of images end: as timm's readers have it, and TIFF."""
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Member(NamedTuple):
    """A file or folder in a tar: its name, and where its bytes lie."""

    name: str
    is_folder: bool
    offset: int
    size: int


class _Header(tarfile.TarInfo):
    """A header whose sizes are checked before anything of that size is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _HEADERS and header.size > MAX_HEADER_BYTES):
            raise _Refused(f"a header of {header.size} bytes")
        return header


class _Refused(Exception):
    """Why an archive is not read."""


def members(path: Path) -> Iterator[Member]:
    """List the files and folders of an uncompressed tar in their order; reads headers only.

    Raises:
        InvalidInput: the file is missing or compressed.
        DamagedFile: truncated, damaged, a name twice, a name that leaves the archive, a link, a
            device, a sparse file, or a header over 1 MiB.
    """
    if not path.is_file():
        raise InvalidInput(f"open_data: the archive must exist, got {path}")
    try:
        with open(path, "rb") as file:
            yield from _members(file)
    except tarfile.CompressionError as error:
        raise InvalidInput(f"open_data: {path} must be a plain tar, got {error}") from None
    # headers are text of strangers: the tar reader also raises ValueError, IndexError and others
    except (_Refused, tarfile.TarError, OSError, ArithmeticError, LookupError, ValueError) as error:
        raise DamagedFile(
            f"open_data: {path} must be a whole, uncompressed tar of files and folders, got "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    except RecursionError:
        raise DamagedFile(f"open_data: {path} must be a tar, got headers without end") from None


def _members(file: BinaryIO) -> Iterator[Member]:
    total = os.fstat(file.fileno()).st_size
    seen: set[str] = set()
    end = 0
    tar: Any
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        while (header := tar.next()) is not None:
            # it would keep every header
            tar.members.clear()
            name = _safe_name(header.name)
            if not (header.isreg() or header.isdir()) or header.issparse():
                raise _Refused(
                    f"the link, device or sparse file {name!r}; make it of plain files "
                    "(tar --dereference --hard-dereference)"
                )
            if header.size < 0 or header.offset < end or header.offset_data + header.size > total:
                raise _Refused(f"{name!r} of {header.size} bytes that does not fit")
            end = header.offset_data + header.size
            if name in seen and not header.isdir():
                raise _Refused(f"the name {name!r} twice")
            seen.add(name)
            if name:
                yield Member(name, header.isdir(), header.offset_data, header.size)
    # the tar reader takes a damaged header for the end of the archive
    file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _Refused(f"no end mark after {end} bytes: it is truncated or damaged there")


def _safe_name(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or len(name) > MAX_NAME:
        raise _Refused(f"a name that leaves the archive or is too long, {name[:200]!r}")
    return "/".join(parts)


def is_image(name: str) -> bool:
    """Whether the name ends like an image, and is not what macOS writes beside one on a disk."""
    file = os.path.basename(name)
    return os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("._")


def instead_of_images(names: Iterable[str], where: str = "") -> str:
    """What an error says was found where none of the names is that of an image."""
    found = sorted({os.path.splitext(name)[1].lower() or "names without one" for name in names})
    if not found:
        return f"none{where}"
    kinds = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    return f"none{where} but {kinds} (accepted: {', '.join(sorted(SUFFIXES))})"


def natural_key(name: str) -> str:
    """Sort as people count: ``a2`` before ``a10``.

    The order is that of timm's readers, which split a name into text and numbers; where they see no
    difference (``a1``, ``A01``) the name itself decides. One text takes less memory than its parts.
    """
    # a null sorts before any text, as the end of a part does; more digits make a larger number
    key = re.sub(r"\d+", lambda found: _sortable(str(int(found[0]))), name.lower())
    return f"{key}\0\0{name}"


def _sortable(digits: str) -> str:
    return f"\0{chr(len(digits))}{digits}"


class Archives(Photographs):
    """Images at known places in tar files; every read opens the file again."""

    _places: tuple[array, array, array]
    _archives: list[Path]

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        # loader processes share a tensor, and copy an array
        self._rows = torch.from_numpy(np.array(self._places)).T
        del self._places

    def open(self, sample: int) -> BinaryIO:
        """Read the bytes of one image."""
        archive, offset, size = self._rows[sample].tolist()
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_IMAGE_BYTES}")
        with open(self._archives[archive], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def path(self, sample: int) -> str:
        """The archive and the name in it."""
        archive = self._archives[int(self._rows[sample, 0])]
        return f"{archive}:{self.names[sample]}"

    def _start(self) -> None:
        self._archives = []
        # numbers, not objects: a data set may have millions
        self._places = (array("q"), array("q"), array("q"))

    def _place(self, member: Member) -> None:
        """Remember where the next image lies: in the newest archive."""
        for column, value in zip(
            self._places, (len(self._archives) - 1, member.offset, member.size), strict=True
        ):
            column.append(value)
