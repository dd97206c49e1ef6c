"""What of a photograph is shown: geometry alone, so that whoever resizes computes no more of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """A window of a resized photograph.

    Attributes:
        box: (left, top, right, bottom) of what is resized, in pixels of the upright photograph;
            need not be whole numbers.
        resized: (width, height) that the box is resized to, in pixels.
        window: (left, top, width, height) of what is shown of that, in its pixels; where it begins
            or ends outside, ``border`` says what is seen there.
        border: ``mirror``, or one value per channel.
    """

    box: tuple[float, float, float, float]
    resized: tuple[int, int]
    window: tuple[int, int, int, int]
    border: str | tuple[int, ...] = "mirror"
