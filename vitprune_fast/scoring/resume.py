"""A score run that can be stopped and taken up again: its sums in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import parse_json
from ..sealed import CheckpointRefused, Sealed
from .scores import Accumulator


class Checkpoint:
    """Where the sums of a score run are kept.

    The sums are in fp64 and go through the file bit for bit, so a run that was stopped ends with
    the scores of one that was not.

    Args:
        path: a safetensors file; gone when the run is done.
        identity: what decides the scores; a file of another identity is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self._file = Sealed(
            path,
            "score",
            "the sums of a score run",
            json.dumps(dict(identity), sort_keys=True),
            "model, criterion, loss, units, seed, dtype, path or micro-batch",
        )
        self._facts: dict[str, Any] = {}
        self._expected = ""
        self._done = 0
        self._seen = hashlib.blake2b(digest_size=16)

    def remembered(self, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stopped run found out before its first sum, or what ``find`` does; kept as well.

        Raises:
            RunFolderError: no file can be put there.
            CheckpointRefused: the file does not hold such facts, or is of another run.
        """
        found = self._file.read()
        if found is None:
            self._facts = find()
            return self._facts
        with self._file.expecting(TypeError, RuntimeError):
            facts = parse_json(found[1]["facts"].encode())
            if not isinstance(facts, dict):
                raise ValueError("named facts")
        self._facts = facts
        return facts

    def load(self, accumulator: Accumulator) -> int:
        """Take up the sums of a stopped run; returns the micro-batches they hold.

        Raises:
            RunFolderError: no file can be put there.
            CheckpointRefused: the file does not hold such sums, or those of another run.
        """
        found = self._file.read()
        if found is None:
            return 0
        tensors, words = found
        with self._file.expecting(TypeError, RuntimeError):
            done, self._expected = parse_json(words["done"].encode()), words["seen"]
            if type(done) is not int or done < 0:
                raise ValueError("a number of micro-batches")
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
                f"score: batches must be those that the checkpoint {self._file.path} was made of, "
                "got others; delete it to start over"
            )

    def keep(self, accumulator: Accumulator, pieces: Sequence[Any]) -> None:
        """Take note of what was added; write the sums when it is time."""
        self._note(pieces)
        if self._file.is_due:
            self.write(accumulator)

    def write(self, accumulator: Accumulator) -> None:
        """Write the sums, atomically."""
        assert accumulator.sums is not None
        tensors = {"sums": accumulator.sums.cpu(), "counts": accumulator.counts.cpu()}
        if accumulator.rows:
            tensors["rows"] = torch.cat(accumulator.rows)
        words = {"done": str(self._done), "seen": self._seen.hexdigest()}
        self._file.write(tensors, {**words, "facts": json.dumps(self._facts)})

    def remove(self) -> None:
        """Delete the file: the run is finished."""
        self._file.remove()

    def _note(self, pieces: Sequence[Any]) -> None:
        for piece in pieces:
            self._seen.update(len(piece.labels).to_bytes(8, "little"))
            # of any dtype, also of one that numpy does not know
            self._seen.update(piece.labels.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._done += 1
