"""Unreadable images: found before a run starts, listed, counted, never replaced by another one."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

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
    reasons = DataLoader(
        _Reasons(source, [sample for sample, _ in samples]),
        batch_size=None,
        num_workers=workers,
        generator=generator(0, "workers"),
    )
    return [
        BadImage(sample, split, source.names[sample], reason)
        for (sample, split), reason in zip(samples, reasons, strict=True)
        if reason
    ]


class _Reasons(Dataset):
    """Why each sample cannot be read, or an empty text."""

    def __init__(self, source: Photographs, samples: list[int]) -> None:
        self.source = source
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str:
        sample = self.samples[index]
        try:
            self.source.image(sample)
        except DamagedFile as error:
            return str(error).partition(f"{self.source.path(sample)}: ")[2] or str(error)
        return ""
