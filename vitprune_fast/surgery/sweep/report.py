"""What a sweep did, branch by branch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Fit:
    """One fit: errors are root mean squares over tokens and channels.

    They are shares of the standard deviation of what should come out: what a branch has to write
    for the stream to be the dense one, what the maps of the dense model read, its logits. Where
    that is constant they are what they are.

    Attributes:
        place: path of the branch or the classifier in the dense model.
        part: `reader` (what the maps of a branch read), `writer` (what the stream is after it) or
            `classifier` (what a map after the last branch puts out: logits, and the queries, keys
            and values of class attention).
        before: error on the images that were fitted to, without this fit.
        after: with it.
        held_out: with it, on images that were not fitted to.
        ridge: of the fit, a share of the mean variance of what was read; infinite where the bias
            alone was fitted, None where nothing was.
        left_out: why nothing was changed; empty where it was.
        note: what was odd about this fit.
    """

    place: str
    part: str
    before: float
    after: float
    held_out: float
    ridge: float | None
    left_out: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: there it is a word."""
        return {**asdict(self), "ridge": "infinite" if self.ridge == math.inf else self.ridge}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Fit:
        """What ``to_dict`` made."""
        ridge = content["ridge"]
        return cls(**{**content, "ridge": math.inf if ridge == "infinite" else ridge})


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did.

    Attributes:
        images: how many were read.
        held_out: how many of them were held out.
        tokens: of the images that were fitted to.
        fits: in the order they were made.
        odd: what was odd about the images.
        dtype: that forward passes computed in, by name; empty where none was made.
    """

    images: int = 0
    held_out: int = 0
    tokens: int = 0
    fits: tuple[Fit, ...] = ()
    odd: tuple[str, ...] = ()
    dtype: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the images, and about fits."""
        return (
            *self.odd,
            *(f"{one.place}, {one.part}: {one.note}" for one in self.fits if one.note),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fits = [one.to_dict() for one in self.fits]
        return {**asdict(self), "fits": fits, "warnings": self.warnings}
