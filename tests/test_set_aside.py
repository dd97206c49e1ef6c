"""Unreadable images: found when they are needed, none replaced, each counted once."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.run.conftest import TINY
from tests.unreadable import unreadable
from vitprune_fast.config.run import DataConfig
from vitprune_fast.data import BadImage, Batch, ImageData, Loader, open_data
from vitprune_fast.data.folder import Folder
from vitprune_fast.errors import DamagedFile, InvalidInput, StageFailed, VitpruneError
from vitprune_fast.recipes.start import run

SPLITS = ("train", "validation", "test")
NOBODY = 65534


def _encoded(image: Image.Image, kind: str = "jpeg", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


_JPEG = _encoded(_noise())
_BAD = {
    "truncated.jpg": _JPEG[:-300],
    "zero bytes.jpg": b"",
    "text.png": b"not an image\n",
    "bomb.png": _bomb(50_000, 50_000),
    "small bomb.png": _bomb(10_000, 8_000),
    "float.jpg": _encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "tiff"),
    "header only.png": b"\x89PNG\r\n\x1a\n",
    "ünicode\ntext 1.jpg": b"no",
}


def _add_bad_files(folder: Path) -> set[str]:
    for name, content in _BAD.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "locked.jpg").write_bytes(_JPEG)
    (folder / "locked.jpg").chmod(0)
    return {*_BAD, "dangling.jpg", "locked.jpg"}


def _add_odd_good_files(folder: Path) -> int:
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    frames = [Image.new("L", (8, 8), value) for value in (255, 0, 9)]
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    good = {
        "cmyk.jpg": _encoded(_noise().convert("CMYK")),
        "deep.png": _encoded(deep, "png"),
        "palette.png": _encoded(_noise().quantize(16), "png"),
        "clear palette.png": _encoded(_noise().quantize(16), "png", transparency=3),
        "png inside.jpg": _encoded(_noise(), "png"),
        "animated.jpg": _encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "turned.JPEG": _encoded(_noise(), exif=upside_down),
        "ünicode\nname 1x300.PNG": _encoded(Image.new("RGB", (1, 300)), "png"),
        " space .jpg": _JPEG,
    }
    for name, content in good.items():
        (folder / name).write_bytes(content)
    (folder / "linked.jpg").symlink_to(folder / "cmyk.jpg")
    (folder / "folder.jpg").mkdir()
    return len(good) + 1


@pytest.fixture
def photos() -> Iterator[Path]:
    """Three classes of twenty photographs where any user may look."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "photos"
        for label, kind in enumerate(("cat", "dog", "eel")):
            (root / kind).mkdir(parents=True)
            for index in range(20):
                path = root / kind / f"{index}.jpg"
                path.write_bytes(_encoded(_noise(100 * label + index)))
        Path(name).chmod(0o755)
        yield root


def _open(root: Path) -> ImageData:
    return open_data(f"folder:{root}", image_size=16, channels=3)


def _drop_rights() -> None:
    # a folder for sockets that may be there already is only for who made it
    process: Any = multiprocessing.current_process()
    process._config.pop("tempdir", None)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _unprivileged(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process that file permissions bind; root's ignore them."""
    if os.getuid() != 0:
        return function(*arguments)
    # decoders are imported now, from places that only root may be able to read
    Image.init()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_drop_rights) as pool:
        return pool.submit(function, *arguments).result()


def _unread(root: Path, workers: int) -> list[BadImage]:
    data = open_data(f"folder:{root}", image_size=16, channels=3, max_bad=0.2)
    return unreadable(data, workers)


def _attempt(root: Path) -> str:
    try:
        _open(root)
    except InvalidInput as error:
        return str(error)
    return "opened"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_found_and_nothing_else(photos: Path, workers: int) -> None:
    wanted = {f"cat/{name}" for name in _add_bad_files(photos / "cat")}
    good = _add_odd_good_files(photos / "dog")
    assert len(_open(photos).source.names) == 60 + good + len(wanted)
    bad = _unprivileged(_unread, photos, workers)
    assert {each.name for each in bad} == wanted and len(bad) == len(wanted)
    assert bad == sorted(bad, key=lambda each: each.id)
    reasons = {Path(each.name).name: each.reason for each in bad}
    assert "exceeds limit" in reasons["bomb.png"]
    assert reasons["small bomb.png"] == "10000 x 8000 pixels, more than 67108864"
    assert reasons["locked.jpg"] == "Permission denied"
    assert reasons["dangling.jpg"] == "No such file or directory"
    assert "truncated" in reasons["truncated.jpg"]


def test_a_pipe_or_a_device_is_no_image_and_nobody_waits_for_it(photos: Path) -> None:
    os.mkfifo(photos / "cat" / "pipe.jpg")
    (photos / "cat" / "zero.jpg").symlink_to("/dev/zero")
    bad = _unread(photos, 0)
    assert [each.name for each in bad] == ["cat/pipe.jpg", "cat/zero.jpg"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hole_moves_nothing(photos: Path, workers: int) -> None:
    def batches(data: ImageData, **options: Any) -> list[Batch]:
        loader = Loader(data.split("train"), 5, shuffle=True, workers=workers, **options)
        return [*loader.epoch(1)]

    whole = batches(_open(photos))
    gone = whole[2][2][3]
    data = open_data(f"folder:{photos}", image_size=16, channels=3, max_bad=0.1)
    (photos / data.source.names[int(gone)]).write_bytes(b"")
    kept = batches(data)
    assert [len(labels) for _, labels, _ in kept] == [5, 5, 4, *[5] * (len(whole) - 4), 2]
    for (images, labels, ids), (x, y, found) in zip(whole, kept, strict=True):
        rest = ids != gone
        assert torch.equal(images[rest], x) and torch.equal(labels[rest], y)
        assert torch.equal(ids[rest], found)
    # met again, it is counted once
    assert [each.id for each in data.set_aside] == [int(gone)]
    batches(data)
    assert len(data.set_aside) == 1


def test_what_is_kept_is_read_once_also_what_cannot_be_read(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(f"folder:{photos}", image_size=16, channels=3, max_bad=0.1)
    (photos / data.source.names[int(data.split_ids["train"][7])]).write_bytes(b"")
    images = data.split("train").some(torch.arange(20))
    opened: list[int] = []
    honest = Folder.open

    def noted(self: Folder, sample: int) -> Any:
        opened.append(sample)
        return honest(self, sample)

    monkeypatch.setattr(Folder, "open", noted)
    first = [*Loader(images, 8, keep=True)]
    assert len(opened) == 20
    # other batches of the same images
    again = [*Loader(images.some(torch.arange(19, -1, -1)), 6, keep=True)]
    assert len(opened) == 20
    assert torch.equal(
        torch.cat([x for x, _, _ in again]).flip(0), torch.cat([x for x, _, _ in first])
    )
    assert sum(len(ids) for _, _, ids in again) == 19


def test_a_batch_of_which_nothing_can_be_read_is_kept_too(photos: Path) -> None:
    data = open_data(f"folder:{photos}", image_size=16, channels=3, max_bad=0.1)
    images = data.split("train").some(torch.arange(3))
    (photos / data.source.names[int(images.ids[1])]).write_bytes(b"")
    loader = Loader(images, 1, keep=True)
    for _ in range(2):
        assert [len(ids) for _, _, ids in loader] == [1, 0, 1]


def test_a_file_may_have_anything_behind_its_image(photos: Path) -> None:
    before = next(iter(Loader(_open(photos).split("train"), 1)))[0]
    with open(photos / _open(photos).source.names[0], "r+b") as file:
        file.truncate(3 << 29)
    tracemalloc.start()
    after = next(iter(Loader(_open(photos).split("train"), 1)))[0]
    assert torch.equal(before, after) and tracemalloc.get_traced_memory()[1] < 1 << 29
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["train.csv", "wnids.txt", "ILSVRC2012_devkit_t12/data/meta.mat"])
def test_nobody_waits_for_a_table_that_is_a_pipe(photos: Path, name: str) -> None:
    (photos / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(photos / name)
    with contextlib.suppress(VitpruneError):
        _open(photos)


def test_what_was_repaired_is_an_image_again(photos: Path, tmp_path: Path) -> None:
    config = replace(
        TINY,
        out=tmp_path / "run",
        data=DataConfig(source=f"folder:{photos}", batch_size=16, max_bad=0.0, workers=0),
    )
    path = photos / "eel" / "7.jpg"
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(StageFailed, match=r"at most 0\.00% .* got 1: eel/7.jpg .*; repair"):
        run(config)
    with pytest.raises(StageFailed, match=r"got 1: eel/7\.jpg"):
        run(config)
    path.write_bytes(content)
    run(config)
    assert json.loads((config.out / "set_aside.json").read_text()) == {"images": []}


def test_too_many_bad_images_end_the_reading(photos: Path) -> None:
    (photos / "cat" / "text.jpg").write_text("no")
    with pytest.raises(StageFailed, match=r"at most 1\.00% of 61 images .* got 1: cat/text.jpg"):
        unreadable(_open(photos))
    data = open_data(f"folder:{photos}", image_size=16, channels=3, max_bad=1 / 61)
    assert len(unreadable(data)) == 1


def test_an_unreadable_image_is_named_where_it_was_asked_for(photos: Path) -> None:
    data = _open(photos)
    sample = int(data.split_ids["validation"][1])
    (photos / data.source.names[sample]).write_bytes(b"")
    with pytest.raises(DamagedFile) as caught:
        data.split("validation")[1]
    message = str(caught.value)
    assert message.startswith("open_data: image must be readable, got ")
    assert data.source.names[sample] in message and "\n" not in message


def test_a_reader_that_the_system_ends_is_said(photos: Path) -> None:
    loader, before = Loader(_open(photos).split("train"), 1, workers=2), {*processes()}
    batches = iter(loader)
    next(batches)
    started = {*processes()} - before
    assert len(started) == 2
    os.kill(started.pop(), signal.SIGKILL)
    with pytest.raises(StageFailed, match="data: processes that read images must live, got one"):
        list(batches)
    # others are started for the next
    assert sum(len(ids) for _, _, ids in loader) == len(loader.images)
    loader.close()
    assert {*processes()} <= before


def processes() -> list[int]:
    """Those that this one has started."""
    return [each.pid or 0 for each in multiprocessing.active_children()]


def test_a_folder_that_cannot_be_listed_is_an_error(photos: Path) -> None:
    assert _unprivileged(_attempt, photos) == "opened"
    (photos / "cat" / "more").mkdir()
    (photos / "cat" / "more").chmod(0)
    message = _unprivileged(_attempt, photos)
    assert message.startswith("open_data: every folder must be readable, got ")
    assert f"{photos}/cat/more: Permission denied" in message


@pytest.mark.parametrize("target", [".", "..", "../cat"])
def test_links_in_a_circle_are_an_error(photos: Path, target: str) -> None:
    for name in ("one", "two"):
        (photos / "cat" / name).symlink_to(target)
    with pytest.raises(InvalidInput, match=r"links must not lead in a circle, got .*/cat/"):
        _open(photos)


def test_links_in_a_wider_circle_are_an_error(photos: Path) -> None:
    for name in ("one", "two"):
        (photos / "cat" / name).symlink_to("../dog")
        (photos / "dog" / name).symlink_to("../cat")
    with pytest.raises(InvalidInput, match="links must not lead in a circle"):
        _open(photos)


def test_the_run_counts_what_it_set_aside(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "text.jpg").write_text("no")
    (photos / "eel" / "empty.jpg").write_text("")
    data = DataConfig(source=f"folder:{photos}", batch_size=16, max_bad=0.05, workers=0)
    config = replace(TINY, out=tmp_path / "run", data=data)
    run(config)
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["set_aside"]["unreadable images"] == 2
    listed = json.loads((config.out / "set_aside.json").read_text())["images"]
    assert [image["name"] for image in listed] == ["cat/text.jpg", "eel/empty.jpg"]
    assert all(image["reason"] == "no image of a known kind" for image in listed)
    page = (config.out / "report.html").read_text()
    assert "2 unreadable images" in page or "unreadable images: 2" in page

    strict = replace(config, out=tmp_path / "strict", data=replace(data, max_bad=0.01))
    with pytest.raises(StageFailed, match=r"at most 1\.00% of 62 images may be unreadable, got 1"):
        run(strict)
    assert not (strict.out / "scores.safetensors").exists()
