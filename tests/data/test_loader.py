"""What loader processes are given, and how they start."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitprune_fast.data import Loader, RandomCrop, open_data
from vitprune_fast.data.folder import Folder
from vitprune_fast.data.names import Names

SERVED = """
import multiprocessing, sys
import torch
from multiprocessing import forkserver
from vitprune_fast.data import Loader, RandomCrop, open_data

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    data = open_data(f"folder:{sys.argv[1]}", image_size=16, channels=3).split("train")
    options = dict(shuffle=True, augment=RandomCrop(), seed=1)
    ours, theirs = (Loader(data, 4, workers=n, **options) for n in (0, 2))
    for epoch in range(2):
        for one, other in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # imported by the server, once, and not by every process
    assert "vitprune_fast.data.loader" in forkserver._forkserver._preload_modules
    theirs.close()
    print("the same")
"""


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0)
    for number in range(24):
        file = tmp_path / "photographs" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (20, 24, 3), np.uint8)).save(file)
    return tmp_path / "photographs"


def test_processes_of_a_server_read_the_same(photographs: Path, tmp_path: Path) -> None:
    """How processes start from Python 3.14 on where nobody says otherwise."""
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    command = [sys.executable, str(script), str(photographs)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


def test_what_a_process_is_given_does_not_grow_with_the_images(photographs: Path) -> None:
    """Names and numbers of millions of images are shared, not copied."""
    images = open_data(f"folder:{photographs}", image_size=16, channels=3).split("train")
    source = images.source
    assert isinstance(source, Folder)

    def given(count: int) -> int:
        source.names = Names(f"train/a/{number:010}.png" for number in range(count))
        source.labels = torch.zeros(count, dtype=torch.int64)
        source.splits = {"train": torch.arange(count)}
        many = replace(images, ids=source.splits["train"])
        loader = Loader(many, 4, shuffle=True, augment=RandomCrop())
        loader.labels(0, 0)
        return len(ForkingPickler.dumps(loader._batches))

    few, many = given(10), given(20_000)
    assert abs(many - few) < 100


def test_places_in_archives_are_shared_too(photographs: Path, tmp_path: Path) -> None:
    content = next(photographs.rglob("*.png")).read_bytes()

    def given(count: int) -> int:
        archive = tmp_path / f"{count:05}.tar"
        with tarfile.open(archive, "w") as tar:
            for number in range(count):
                member = tarfile.TarInfo(f"{'ab'[number % 2]}/{number:05}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        images = open_data(f"tar:{archive}", image_size=16, channels=3).split("train")
        assert not images[0][0].isnan().any()
        return len(ForkingPickler.dumps(images.source))

    few, many = given(24), given(400)
    assert abs(many - few) < 100


LEFT_OPEN = """
import multiprocessing, sys
from vitprune_fast.data import Loader, open_data

def read(folder):
    global loader, batches
    data = open_data(f"folder:{folder}", image_size=16, channels=3).split("train")
    loader = Loader(data, 1, workers=2)
    batches = iter(loader)
    next(batches)

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[2]).Process(target=read, args=sys.argv[1:2])
    process.start()
    process.join()
    print(process.exitcode)
    read(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_ends_with_readers_that_nobody_closed(
    photographs: Path, tmp_path: Path, method: str
) -> None:
    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN)
    command = [sys.executable, str(script), str(photographs), method]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", ""), done.stderr
