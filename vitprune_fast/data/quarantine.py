"""Unreadable images: found before a run starts, listed, counted, never replaced by another one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from vitprune_fast.data.images import Source
from vitprune_fast.data.photographs import Photographs
from vitprune_fast.errors import DamagedFile
from vitprune_fast.randomness import generator


@dataclass(frozen=True)
class BadImage:
    """One image that cannot be read.

    Attributes:
        id: the sample's number in the data set.
        split: the split it was listed in.
        name: its path in the data folder.
        reason: what the decoder said.
    """

    id: int
    split: str
    name: str
    reason: str


def find_bad_images(
    source: Source, split_ids: dict[str, list[int]], workers: int = 0
) -> list[BadImage]:
    """Decode every image once; see ``ImageData.find_bad_images``."""
    if not isinstance(source, Photographs):
        return []
    samples = sorted((sample, split) for split, ids in split_ids.items() for sample in ids)
    numbers: Any = [sample for sample, _ in samples]
    reasons = DataLoader(
        numbers,
        batch_size=None,
        num_workers=workers,
        collate_fn=partial(_reason, source),
        generator=generator(0, "workers"),
    )
    return [
        BadImage(sample, split, source.names[sample], reason)
        for (sample, split), reason in zip(samples, reasons, strict=True)
        if reason
    ]


def _reason(source: Photographs, sample: Any) -> str:
    """Why a sample cannot be read, or an empty text."""
    try:
        source.image(sample)
    except DamagedFile as error:
        return str(error).partition(f"{source.path(sample)}: ")[2] or str(error)
    return ""
