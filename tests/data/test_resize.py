"""resize_window: every bit of Pillow's resize, on every instruction set, and no byte beyond it."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import Processors
from torch.utils.data import DataLoader

from vitprune_fast._extension import OBSTACLE
from vitprune_fast.data import resize
from vitprune_fast.data.resize import INTERPOLATIONS, resize_window
from vitprune_fast.errors import InvalidInput

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
KERNEL = ("bilinear", "bicubic", "lanczos")
# box, resized, window
Geometry = tuple[tuple[float, float, float, float], tuple[int, int], tuple[int, int, int, int]]


def _interval(rng: np.random.Generator, size: int) -> tuple[float, float]:
    """A part of an axis: whole, with whole ends, or any, down to a tenth of a pixel."""
    kind = rng.integers(4)
    if kind == 0:
        return 0.0, float(size)
    begin = rng.random() * (size - 0.1)
    end = begin + 0.1 + rng.random() * (size - 0.1 - begin)
    return (float(int(begin)), float(np.ceil(end))) if kind == 1 else (begin, min(end, size))


def _cases(count: int, most: int) -> Iterator[tuple[np.ndarray, Geometry]]:
    """Images and what to make of them: up and down, grey and RGB, from one pixel on."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(1, most, 2).tolist()
        pixels = rng.integers(0, 256, (height, width, (1, 3)[number % 2]), dtype=np.uint8)
        if number % 3 == 0:
            # overshoots on both sides
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        left, right = _interval(rng, width)
        top, bottom = _interval(rng, height)
        wide, high = (
            size if rng.integers(4) == 0 else int(rng.integers(1, most)) for size in (width, height)
        )
        w, h = (int(rng.integers(1, size + 1)) for size in (wide, high))
        x, y = int(rng.integers(wide - w + 1)), int(rng.integers(high - h + 1))
        yield pixels, ((left, top, right, bottom), (wide, high), (x, y, w, h))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _cut(image: Image.Image, window: tuple[int, int, int, int]) -> np.ndarray:
    x, y, width, height = window
    return np.asarray(image.crop((x, y, x + width, y + height))).reshape(height, width, -1)


def _by_axes(pixels: np.ndarray, geometry: Geometry, name: str, columns_first: bool) -> np.ndarray:
    """One axis at a time, in which all versions of Pillow agree."""
    (left, top, right, bottom), (width, height), window = geometry
    image, filter_ = _image(pixels), INTERPOLATIONS[name]
    for columns in (columns_first, not columns_first):
        if columns:
            box = (0, top, image.width, bottom)
            image = image.resize((image.width, height), filter_, box=box)
        else:
            box = (left, 0, right, image.height)
            image = image.resize((width, image.height), filter_, box=box)
    return _cut(image, window)


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("most", [5, 40, 150])
def test_has_the_bits_of_pillow(name: str, most: int) -> None:
    for pixels, geometry in _cases(300, most):
        box, resized, window = geometry
        want = _cut(_image(pixels).resize(resized, INTERPOLATIONS[name], box=box), window)
        got = resize_window(torch.from_numpy(pixels), *geometry, name)
        assert np.array_equal(got.numpy(), want), (pixels.shape, geometry)


@native
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("name", KERNEL)
def test_either_axis_may_come_first(name: str, columns_first: bool) -> None:
    kernel = torch.ops.vitprune_fast.resize_window
    for pixels, geometry in _cases(150, 60):
        got = kernel(torch.from_numpy(pixels), *geometry, name, columns_first)
        want = _by_axes(pixels, geometry, name, columns_first)
        assert np.array_equal(got.numpy(), want), (pixels.shape, geometry)


def test_pillow_does_the_same_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(torch.from_numpy(pixels), geometry) for pixels, geometry in _cases(100, 50)]
    found = [resize_window(pixels, *geometry) for pixels, geometry in cases]
    monkeypatch.setattr(resize, "OBSTACLE", "taken away")
    for (pixels, geometry), want in zip(cases, found, strict=True):
        assert torch.equal(resize_window(pixels, *geometry), want)


def test_takes_photographs_that_lie_anywhere() -> None:
    pixels = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8).permute(1, 2, 0)
    geometry: Geometry = ((1.5, 2.5, 38.0, 29.0), (16, 12), (3, 2, 10, 9))
    assert torch.equal(
        resize_window(pixels, *geometry), resize_window(pixels.contiguous(), *geometry)
    )


@native
def test_computes_no_more_than_the_window() -> None:
    # all of it would be an exabyte
    pixels = torch.full((7, 5, 3), 200, dtype=torch.uint8)
    size = 2**30
    got = resize_window(pixels, (0, 0, 5, 7), (size, size), (size - 4, size - 3, 4, 3), "lanczos")
    assert torch.equal(got, torch.full((3, 4, 3), 200, dtype=torch.uint8))


# what is read ends where memory ends: a byte more, and the process is gone
SCRIPT = """
import ctypes, mmap, torch
libc, page, found = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []
for pixels, geometry in inputs:
    size = -(-pixels.numel() // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=size)
    last = whole[size - pixels.numel():].view(pixels.shape)
    last.copy_(pixels)
    for name in ("bilinear", "bicubic", "lanczos"):
        for columns_first in (False, True):
            found.append(
                torch.ops.vitprune_fast.resize_window(last, *geometry, name, columns_first)
            )
"""


@native
def test_same_bits_for_every_instruction_set_at_the_end_of_memory(tmp_path: Path) -> None:
    cases: list[Any] = [(torch.from_numpy(pixels), list(g)) for pixels, g in _cases(100, 100)]
    with Processors(tmp_path) as processors:
        processors.assert_same_bits("import vitprune_fast._extension\n" + SCRIPT, cases)


class _Windows:
    """Loads as many views as it is long; a class, so that a process started anew finds it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> torch.Tensor:
        pixels = torch.arange(1200, dtype=torch.int64).remainder(251 + number).to(torch.uint8)
        return resize_window(pixels.view(20, 20, 3), (0, 0, 20, 20), (9, 9), (0, 0, 9, 9))


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_give_the_same(method: str) -> None:
    windows: Any = _Windows()
    context = multiprocessing.get_context(method)
    loaded = list(DataLoader(windows, None, num_workers=1, multiprocessing_context=context))
    assert all(map(torch.equal, loaded, windows))


PIXELS = torch.zeros(6, 8, 3, dtype=torch.uint8)
BOX, RESIZED, WINDOW = (0.0, 0.0, 8.0, 6.0), (4, 3), (0, 0, 4, 3)
REFUSED = [
    ((PIXELS.float(), BOX, RESIZED, WINDOW), "pixels must be uint8, got torch.float32"),
    ((PIXELS[0], BOX, RESIZED, WINDOW), "pixels must have 3 dimensions, got (8, 3)"),
    ((PIXELS[:, :, :2], BOX, RESIZED, WINDOW), "pixels must have 1 or 3 channels, got 2"),
    ((PIXELS, (-0.5, 0, 8, 6), RESIZED, WINDOW), "box must lie inside the image of 8 x 6 pixels"),
    ((PIXELS, (0, 0, 8, 6.5), RESIZED, WINDOW), "box must lie inside the image of 8 x 6 pixels"),
    ((PIXELS, (3, 0, 3, 6), RESIZED, WINDOW), "box must lie inside the image of 8 x 6 pixels"),
    ((PIXELS, (0, 0, 8, np.nan), RESIZED, WINDOW), "box must lie inside the image of 8 x 6 pixels"),
    ((PIXELS, BOX, RESIZED, (1, 0, 4, 3)), "window must lie inside the (4, 3) pixels of"),
    ((PIXELS, BOX, RESIZED, (0, -1, 4, 3)), "window must lie inside the (4, 3) pixels of"),
    ((PIXELS, BOX, RESIZED, (0, 0, 4, 0)), "window must lie inside the (4, 3) pixels of"),
    ((PIXELS, BOX, (0, 3), (0, 0, 0, 3)), "window must lie inside the (0, 3) pixels of"),
    ((PIXELS, BOX, RESIZED, WINDOW, "hamming"), "resampling must be one of nearest, bilinear"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_refuses_wrong_arguments(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"resize_window: {sentence}")):
        resize_window(*arguments)


@native
@pytest.mark.parametrize("arguments", [each for each, _ in REFUSED])
def test_native_code_checks_memory_safety(arguments: tuple[Any, ...]) -> None:
    *geometry, name = (*arguments, "bicubic")[:5]
    with pytest.raises(RuntimeError, match=r"resize_window: \w+ must .*, got"):
        torch.ops.vitprune_fast.resize_window(*geometry, name, False)


def test_a_box_that_single_precision_rounds_into_the_image_is_inside() -> None:
    beyond = resize_window(PIXELS + 7, (0.0, 0.0, 8 + 1e-9, 6.0), RESIZED, WINDOW)
    assert torch.equal(beyond, torch.full((3, 4, 3), 7, dtype=torch.uint8))
