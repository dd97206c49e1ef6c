"""Names of millions of samples in two arrays, which processes share instead of copying them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Names(Sequence[str]):
    """An immutable list of names: 8 bytes each beside their UTF-8, whatever else they are.

    A list of strings takes twice as much, and every process that reads it copies it bit by bit.
    Tensors are not copied: neither by a fork nor when a loader process is started afresh.

    Args:
        names: any text that a file system can name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        # an empty buffer has no tensor
        self._text = torch.frombuffer(text or bytearray(1), dtype=torch.uint8)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)

    @classmethod
    def joined(cls, one: Names, other: Names) -> Names:
        """The names of both, one after the other."""
        both = cls()
        size = int(one._ends[-1])
        both._text = torch.cat([one._text[:size], other._text])
        both._ends = torch.cat([one._ends, other._ends[1:] + size])
        return both

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, end = self._ends[place : place + 2].tolist()
        return self._text[start:end].numpy().tobytes().decode("utf-8", "surrogateescape")
