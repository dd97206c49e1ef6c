"""A score run that can be stopped and taken up again: its sums in a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..files import make_folder, parse_json, read_metadata, read_tensors, write_tensors
from .scores import Accumulator

FORMAT = "vitprune_fast.partial_scores"
# seconds between two writes
EVERY_S = 30.0


class CheckpointRefused(InvalidInput):
    """A checkpoint is damaged, or of another run; without it the run starts anew."""


class Checkpoint:
    """Where the sums of a score run are kept.

    The sums are in fp64 and go through the file bit for bit, so a run that was stopped ends with
    the scores of one that was not.

    Args:
        path: a safetensors file; gone when the run is done.
        identity: what decides the scores; a file of another identity is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        self._identity = json.dumps(dict(identity), sort_keys=True)
        self._expected = ""
        self._written = time.monotonic()
        self._done = 0
        self._seen = hashlib.blake2b(digest_size=16)

    def load(self, accumulator: Accumulator) -> int:
        """Take up the sums of a stopped run; returns the micro-batches they hold.

        Raises:
            RunFolderError: no file can be put there.
            CheckpointRefused: the file does not hold such sums, or those of another run.
        """
        # found out now, and not when there is work to keep
        make_folder(self.path.parent)
        if not self.path.exists():
            return 0
        if not self.path.is_file():
            raise CheckpointRefused(f"score: checkpoint must be a file, got {self.path}")
        try:
            tensors, metadata = read_tensors(self.path), read_metadata(self.path)
            if metadata["format"] != FORMAT:
                raise ValueError(f"format {FORMAT}")
            identity, done = metadata["identity"], parse_json(metadata["done"].encode())
            self._expected = metadata["seen"]
            if type(done) is not int or done < 0:
                raise ValueError("a number of micro-batches")
            if metadata["content"] != _content(tensors, metadata):
                raise ValueError("content as it was written")
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointRefused(
                f"score: checkpoint {self.path} must hold the sums of a score run, got a file "
                f"where this is wrong: {error!s:.300}; delete it to start anew"
            ) from None
        if identity != self._identity:
            raise CheckpointRefused(
                f"score: checkpoint {self.path} must be of this score run, got one of another "
                "model, criterion, units, seed, path or micro-batch; delete it to start anew"
            )
        accumulator.restore(tensors["sums"], tensors["counts"], tensors.get("rows"))
        return done

    def skip(self, stream: Iterator[Any], done: int) -> Iterator[Any]:
        """The stream after the first ``done`` micro-batches.

        Raises:
            CheckpointRefused: those are not the ones the sums were made of.
        """
        for piece in stream:
            if self._done < done:
                self._note([piece])
                if self._done == done:
                    self._check()
            else:
                yield piece
        if self._done < done:
            self._check()

    def _check(self) -> None:
        if self._seen.hexdigest() != self._expected:
            raise CheckpointRefused(
                f"score: batches must be those that the checkpoint {self.path} was made of, "
                "got others; delete it to start anew"
            )

    def keep(self, accumulator: Accumulator, pieces: Sequence[Any]) -> None:
        """Take note of what was added; write the sums when it is time."""
        self._note(pieces)
        if time.monotonic() - self._written >= EVERY_S:
            self.write(accumulator)

    def write(self, accumulator: Accumulator) -> None:
        """Write the sums, atomically."""
        assert accumulator.sums is not None
        tensors = {"sums": accumulator.sums.cpu(), "counts": accumulator.counts.cpu()}
        if accumulator.rows:
            tensors["rows"] = torch.cat(accumulator.rows)
        metadata = {
            "format": FORMAT,
            "identity": self._identity,
            "done": str(self._done),
            "seen": self._seen.hexdigest(),
        }
        metadata["content"] = _content(tensors, metadata)
        write_tensors(self.path, tensors, metadata)
        self._written = time.monotonic()

    def remove(self) -> None:
        """The run is done: nothing is to be taken up."""
        self.path.unlink(missing_ok=True)

    def _note(self, pieces: Sequence[Any]) -> None:
        for piece in pieces:
            self._seen.update(len(piece.labels).to_bytes(8, "little"))
            self._seen.update(piece.labels.cpu().numpy().tobytes())
            self._done += 1


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A number that changes with every bit of a checkpoint: damaged sums look like sums."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("format", "identity", "done", "seen"):
        digest.update(f"{name} {metadata[name]} ".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(model: nn.Module) -> str:
    """A number that another set of weights does not have."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()
