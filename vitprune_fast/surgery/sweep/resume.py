"""A sweep that can be stopped and taken up again: what it fitted, in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import parse_json
from ...ranks import Ranks
from ...sealed import Sealed


class Progress:
    """Which places are fitted, and to what.

    The streams are not kept: they come out of the weights again, bit for bit.

    Args:
        path: a safetensors file, gone when the sweep is done; None keeps nothing.
        identity: what decides the fits; a file of another identity is refused.
        tensors: name -> tensor of the model; those that were fitted are put into them.
        ranks: the processes that share the sweep; all of them read the file, the first writes it.

    Attributes:
        done: how many places are fitted.
        rows: the fits as plain values.

    Raises:
        RunFolderError: no file can be put there.
        CheckpointRefused: the file is damaged, or of another sweep.
        StageFailed: other processes read another file.
    """

    def __init__(
        self, path: Path | None, identity: str, tensors: Mapping[str, Tensor], ranks: Ranks
    ):
        self.rows: list[dict[str, Any]] = []
        self.done = 0
        self._tensors = tensors
        self._changed: set[str] = set()
        self._file, self._ranks = None, ranks
        if path is not None:
            parts = "model, plan, images or dtype"
            self._file = Sealed(path, "prune", "the fits of a sweep", identity, parts)
            self._load(self._file)
        ranks.agree(
            None if path is None else self.done,
            "prune: checkpoint must hold as many places in every process",
            "give a file that all of them can read, or delete it to start over",
        )

    def _load(self, file: Sealed) -> None:
        found = file.read()
        if found is None:
            return
        values, words = found
        with file.expecting(TypeError, RuntimeError):
            state = parse_json(words["state"].encode())
            self.rows, self.done = state["rows"], state["done"]
            for name, value in values.items():
                self._tensors[name].copy_(value)
                self._changed.add(name)

    def finish_place(
        self, rows: list[dict[str, Any]], changed: Iterable[str], *, stopping: bool
    ) -> None:
        """Take note of a place and of all tensors fitted so far; write when it is time.

        Args:
            rows: the fits of the place.
            changed: names of all tensors fitted so far.
            stopping: the sweep ends here, in all processes; it is written before any of them goes.
        """
        self.rows += rows
        self.done += 1
        self._changed |= set(changed)
        self._ranks.first_does("prune", partial(self._write, now=stopping))

    def _write(self, *, now: bool = True) -> None:
        if self._file is not None and (now or self._file.is_due):
            state = json.dumps({"done": self.done, "rows": self.rows})
            values = {name: self._tensors[name] for name in self._changed}
            self._file.write(values, {"state": state})

    def end(self, *, keep: bool) -> None:
        """The sweep is finished: delete the file, unless another sweep has to finish first."""
        if self._file is not None:
            self._ranks.first_does("prune", self._write if keep else self._file.remove)
