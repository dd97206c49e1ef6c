"""One epoch over 200,000 photographs with validations in between: memory stays, nothing is left.

python -m bench.soak [--images N] [--workers N]     (make soak)

The photographs are tiny, and links to a few distinct files: what grows with an image that was read
grows with a small one too. Looks at /proc, so it runs on Linux.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitprune_fast.data import ImageData, Loader, RandomCrop, open_data

DISTINCT, CLASSES, SIDE, BATCH = 2000, 20, 32, 64
VALIDATIONS, LOOKS = 10, 200
# of a process, as /proc calls it
COUNTED = ("Pss_Anon", "Pss_Shmem")
# what memory may grow by once it is warm, as a share
WARM, GROWTH = 0.2, 0.05


@dataclass(frozen=True)
class Report:
    """What was seen.

    Attributes:
        images: that came, training and validation.
        seconds: all of it.
        memory: MiB of this process and its loader processes, in turns of equally many batches.
        files: open before and after.
        processes: started by this one and still there.
    """

    images: tuple[int, int]
    seconds: float
    memory: tuple[float, ...]
    files: tuple[int, int]
    processes: int

    @property
    def growth(self) -> float:
        """From the least to the most memory once it was warm, as a share of the least."""
        warm = self.memory[int(WARM * len(self.memory)) :]
        return max(warm) / min(warm) - 1

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        before, after = self.files
        found = {
            f"memory grew by {self.growth:.1%}, more than {GROWTH:.0%}": self.growth > GROWTH,
            f"{after - before} more files are open than before": after > before,
            f"{self.processes} processes are left": self.processes > 0,
        }
        return [text for text, holds in found.items() if holds]

    def __str__(self) -> str:
        train, validation = self.images
        warm = self.memory[int(WARM * len(self.memory)) :]
        return (
            f"{train:,} training and {validation:,} validation images in {self.seconds:.0f} s; "
            f"{min(warm):,.0f} to {max(warm):,.0f} MiB once warm ({self.growth:.1%}); open files "
            f"{self.files[0]} before, {self.files[1]} after; {self.processes} processes left"
        )


def write(folder: Path, images: int) -> None:
    """Class folders with so many training images, and a hundredth of them for each other part."""
    random = np.random.default_rng(0)
    source = folder / "source"
    source.mkdir()
    # a file can have some ten thousand names
    files = [source / f"{number}.jpg" for number in range(min(DISTINCT, images))]
    for file in files:
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((SIDE + 8, SIDE), Image.Resampling.BILINEAR).save(file)
    few = max(images // 100, CLASSES)
    for part, count in (("train", images), ("val", few), ("test", few)):
        for label in range(CLASSES):
            (folder / "data" / part / str(label)).mkdir(parents=True)
        for number, file in zip(range(count), itertools.cycle(files), strict=False):
            os.link(file, folder / "data" / part / str(number % CLASSES) / f"{number}.jpg")


def soak(data: ImageData, workers: int) -> Report:
    """One epoch of training, looked at all the way."""
    started, files, others = time.perf_counter(), _open_files(), {*_children()}
    train = Loader(
        data.split("train"), BATCH, shuffle=True, augment=RandomCrop(), seed=0, workers=workers
    )
    validation = Loader(data.split("validation"), BATCH, workers=workers, keep=True)
    memory, seen, validated = [], 0, 0
    every, between = (max(1, len(train) // parts) for parts in (LOOKS, VALIDATIONS))
    with closing(train), closing(validation):
        for number, (images, _, _) in enumerate(train.epoch(0), 1):
            seen += len(images)
            if number % between == 0:
                validated += sum(len(shown) for shown, _, _ in validation)
            if number % every == 0:
                memory.append(_resident([os.getpid(), *({*_children()} - others)]))
    # what a caller no longer holds is gone
    del train, validation
    gc.collect()
    seconds, left = time.perf_counter() - started, len({*_children()} - others)
    return Report((seen, validated), seconds, tuple(memory), (files, _open_files()), left)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _children() -> list[int]:
    """Processes that this one has started and that have not been waited for."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            # it ended meanwhile
            continue
        if int(parent) == os.getpid():
            found.append(int(entry.name))
    return found


def _resident(processes: list[int]) -> float:
    """MiB in memory, what these processes share counted once, and files that others map not."""
    total = 0
    for process in processes:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        # in KiB
        total += sum(int(text.partition(f"\n{kind}:")[2].split()[0]) for kind in COUNTED)
    return total / 2**10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        write(Path(name), options.images)
        data = open_data(f"folder:{Path(name) / 'data'}", image_size=SIDE, channels=3)
        report = soak(data, options.workers)
    print(report)
    for fault in report.faults:
        print(f"error: {fault}", file=sys.stderr)
    return bool(report.faults)


if __name__ == "__main__":
    sys.exit(main())
