"""The refit after the cut in words, and the check that it reads no test images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from vitprune_fast.data import ImageData, open_data
from vitprune_fast.errors import InvalidInput, VitpruneError
from vitprune_fast.run.folder import RunFolder


def refit_text(report: Any) -> str:
    """One line about a `SweepReport`: images, fits, how much closer the model came to the dense."""
    applied = [fit for fit in report.fits if not fit.left_out]
    words = [
        f"{report.images:,} images",
        f"{len(applied)} of {len(report.fits)} fits applied",
    ]
    if applied:
        before, after, held_out = (
            f"{median(getattr(fit, name) for fit in applied):.1%}"
            for name in ("before", "after", "held_out")
        )
        words.append(f"median error {before} -> {after} ({held_out} on images held out)")
    return ", ".join(words)


MOST_NAMED = 3
"""Places that are named where many fits were left out for one reason."""


def left_out_lines(report: Any) -> list[str]:
    """The fits that were not applied, a line for each reason: what, where and why."""
    places: dict[tuple[str, str], list[str]] = {}
    for fit in report.fits:
        if fit.left_out:
            places.setdefault((fit.part, fit.left_out), []).append(fit.place)
    lines = []
    for (part, why), found in places.items():
        more = f" and {len(found) - MOST_NAMED:,} more" if len(found) > MOST_NAMED else ""
        lines.append(f"left out: {part} of {', '.join(found[:MOST_NAMED])}{more}: {why}")
    return lines


def refuse_test_images(data: ImageData, chosen: Tensor, places: Iterable[Path]) -> str:
    """Refuses images that are tested on by the run whose model or plan is used.

    The train split of the same data holds none of them, but the folder of the test images can be
    named as data of its own.

    Args:
        data: what was named.
        chosen: numbers of the images that will be read.
        places: the model and the plan; a run folder may be around them.

    Returns:
        What could not be looked at, or nothing.

    Raises:
        InvalidInput: one of the images is among those of the run's test split.
    """
    unknown = ""
    for folder in dict.fromkeys(Path(os.path.realpath(place)).parent for place in places):
        if not (folder / "run.json").is_file():
            continue
        try:
            name = RunFolder(folder).record()["identity"]["data"]["name"]
            # the same images are cut into the same splits
            if name == data.name:
                continue
            other = open_data(name, image_size=data.image_size, channels=data.channels)
        except (VitpruneError, LookupError, TypeError):
            unknown = f"whether {data.name} holds test images of the run in {folder}, whose data "
            unknown += "cannot be opened here"
            continue
        shared = _places(other, other.split_ids["test"]) & _places(data, chosen)
        if shared:
            raise InvalidInput(
                f"prune: data must not hold test images of the run in {folder}, got "
                f"{len(shared):,} of them, such as {min(shared)}; give the run's own: --data {name}"
            )
    return unknown


def _places(data: ImageData, samples: Tensor) -> set[str]:
    """Paths of images; none for those that come with a package."""
    path = getattr(data.source, "path", None)
    return (
        set() if path is None else {os.path.realpath(path(sample)) for sample in samples.tolist()}
    )
