"""Images that cannot be read: found when they are needed, counted, never replaced by others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitprune_fast.errors import StageFailed
from vitprune_fast.ranks import Ranks


@dataclass(frozen=True)
class BadImage:
    """One image that cannot be read.

    Attributes:
        id: the sample's number in the data set.
        split: the split it was read for.
        name: its path in the data folder.
        reason: what the decoder said.
    """

    id: int
    split: str
    name: str
    reason: str


class SetAside(Sequence[BadImage]):
    """The unreadable images that were met so far, each once, in the order of their ids.

    Args:
        images: of all splits.
        max_bad: largest share of them that may be unreadable.

    Attributes:
        on_change: called after others were added, before there may be too many.
    """

    def __init__(self, images: int, max_bad: float) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._images, self._max_bad = images, max_bad
        self._found: dict[int, BadImage] = {}

    def add(self, found: Iterable[BadImage]) -> None:
        """Count images that were met now.

        Raises:
            StageFailed: there are too many; where several processes read, :meth:`share` says so.
        """
        new = {bad.id: bad for bad in found if bad.id not in self._found}
        if new:
            self._found = dict(sorted({**self._found, **new}.items()))
            self.on_change()
        if Ranks.current().world == 1:
            self._judge()

    def share(self, ranks: Ranks) -> None:
        """Make those that any process has met known to all; all of them call.

        Raises:
            StageFailed: together there are too many.
        """
        texts = ranks.texts(json.dumps([asdict(each) for each in self]))
        self.add(BadImage(**each) for text in texts for each in json.loads(text))
        self._judge()

    def __str__(self) -> str:
        """How many, and the first of them by name, on one line."""
        first = "; ".join(f"{each.name} ({each.reason})" for each in self[:3])
        return " ".join(f"{len(self)}: {first}{' ...' if len(self) > 3 else ''}".split())

    def _judge(self) -> None:
        if len(self) > self._max_bad * self._images:
            raise StageFailed(
                f"data: at most {self._max_bad:.2%} of {self._images} images may be unreadable, "
                f"got {self}; repair or remove them, or raise max_bad"
            )

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        # ids are no places
        return [*self._found.values()][index]

    def __iter__(self) -> Iterator[BadImage]:
        return iter(self._found.values())
