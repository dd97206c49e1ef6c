"""Unfinished work in a file: tensors and words with a checksum, since damaged sums look valid."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InvalidInput
from .files import make_folder, read_metadata, read_tensors, write_tensors

# seconds between two writes
EVERY_S = 30.0


class CheckpointRefused(InvalidInput):
    """A checkpoint is damaged, or of another run; without it the work starts over."""


class Sealed:
    """A safetensors file that says what it is, of which work, and what it holds.

    Args:
        path: of the file; gone when the work is done.
        stage: who keeps it, for the error sentences.
        holds: what it holds, as above.
        identity: what decides the results; a file of another identity is refused.
        parts: what the identity is made of, in words.
    """

    def __init__(self, path: Path, stage: str, holds: str, identity: str, parts: str):
        self.path = path
        self._stage, self._holds = stage, holds
        self._identity, self._parts = identity, parts
        self._format = f"vitprune_fast.partial_{stage}"
        self._written = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and words of work that was stopped; None where there is no file.

        Raises:
            RunFolderError: no file can be put there.
            CheckpointRefused: the file is damaged, or of other work.
        """
        check_place(self._stage, self.path)
        if not self.path.exists():
            return None
        with self.expecting():
            tensors, words = read_tensors(self.path), read_metadata(self.path)
            if words["format"] != self._format:
                raise ValueError(f"format {self._format}")
            if words.pop("content") != content(tensors, words):
                raise ValueError("content as it was written")
            identity = words["identity"]
        if identity != self._identity:
            raise CheckpointRefused(
                f"{self._stage}: checkpoint {self.path} must be of this work, got one of another "
                f"{self._parts}; delete it to start over"
            )
        return tensors, words

    @contextmanager
    def expecting(self, *kinds: type[Exception]) -> Iterator[None]:
        """Say of what goes wrong inside that the file does not hold what it should.

        Args:
            *kinds: of errors that mean so, besides ``KeyError`` and ``ValueError``.

        Raises:
            CheckpointRefused: where that is so.
        """
        try:
            yield
        except (KeyError, ValueError, *kinds) as error:
            raise CheckpointRefused(
                f"{self._stage}: checkpoint {self.path} must hold {self._holds}, got a file where "
                f"this is wrong: {error!s:.300}; delete it to start over"
            ) from None

    @property
    def is_due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._written >= EVERY_S

    def write(self, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
        """Replace the file in one step."""
        words = {**words, "format": self._format, "identity": self._identity}
        write_tensors(self.path, tensors, {**words, "content": content(tensors, words)})
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the work is finished."""
        self.path.unlink(missing_ok=True)


def check_place(stage: str, path: Path) -> None:
    """Refuse a place where no file can be, before there is work to keep.

    Raises:
        RunFolderError: its folder cannot be made.
        CheckpointRefused: something else than a file is there.
    """
    make_folder(path.parent)
    if path.exists() and not path.is_file():
        raise CheckpointRefused(f"{stage}: checkpoint must be a file, got {path}")


def content(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> str:
    """A number that changes with every bit of tensors and words."""
    digest = hashlib.blake2b(digest_size=16)
    for name, word in sorted(words.items()):
        digest.update(f"{name} {word} ".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A number that another set of weights does not have."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes a tensor holds, in its own order."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
