"""What evaluation shows of a photograph is timm's pipeline, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.small import photographs
from vitprune_fast.data import CROP_MODES, INTERPOLATIONS, open_data
from vitprune_fast.data.evaluation_view import evaluation_view
from vitprune_fast.data.resize import show

FILL = (10, 120, 250)
MEAN = tuple(value / 255 for value in FILL)
SHARES = (0.5, 0.875, 0.9, 0.95, 1.0, 1.15)
# (height, width) of the input; (width, height) of photographs: wider and higher, of the input's
# size, smaller on one side and on both, and single pixels
INPUTS = ((16, 16), (12, 21), (21, 12))
PHOTOGRAPHS = ((50, 37), (37, 50), (16, 16), (61, 9), (9, 61), (7, 5), (1, 4), (1, 1))


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, shape, np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("mode", CROP_MODES)
def test_the_view_is_timm_s(mode: str, interpolation: str) -> None:
    for size, share in itertools.product(INPUTS, SHARES):
        transform = create_transform(
            (3, *size),
            crop_pct=share,
            crop_mode=mode,
            interpolation=interpolation,
            mean=MEAN,
            normalize=False,
        )
        for photograph in PHOTOGRAPHS:
            image = noise(*photograph)
            view = evaluation_view(photograph, size, share, mode, FILL)
            shown = show(np.array(image), view, interpolation)
            wanted = transform(image).permute(1, 2, 0).numpy()  # pyright: ignore
            assert np.array_equal(shown, wanted), (size, share, photograph)


@pytest.mark.parametrize("mode", CROP_MODES)
def test_a_data_set_hands_out_what_timm_s_pipeline_does(tmp_path: Path, mode: str) -> None:
    root = photographs(tmp_path, size=(31, 18))
    transform = create_transform(
        (3, 16, 24), crop_pct=0.9, crop_mode=mode, interpolation="bilinear", mean=MEAN, std=MEAN
    )
    data = open_data(
        *(f"folder:{root}",),
        image_size=(16, 24),
        channels=3,
        mean=MEAN,
        std=MEAN,
        crop_share=0.9,
        crop_mode=mode,
        interpolation="bilinear",
    )
    images = data.split("test")
    for row, sample in enumerate(images.ids.tolist()):
        image = Image.open(root / data.source.names[sample])
        assert torch.equal(images[row][0], transform(image))  # pyright: ignore


def test_a_grey_photograph_has_a_grey_border() -> None:
    view = evaluation_view((8, 4), (8, 8), crop_mode="border", fill=(77,))
    image = np.array(noise(8, 4, 1))[:, :, None]
    shown = show(image, view, "bicubic")
    assert shown.shape == (8, 8, 1) and (shown[[0, 1, 6, 7]] == 77).all()
    assert np.array_equal(shown[2:6], image)


def test_of_an_endless_photograph_only_the_window_is_resized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # one that timm would resize to 16 x 16 million pixels
    view = evaluation_view((1, 1_000_000), (16, 16))
    shown = show(np.full((1_000_000, 1, 1), 5, np.uint8), view, "bicubic")
    assert view.resized == (16, 16_000_000) and (shown == 5).all()
    # of smaller ones that shows the same but for two roundings to whole levels, the first of which
    # weights of up to 1.25 in all enlarge, in each of the two ways; grey enough to cut nothing off
    cases = [
        (
            64 + np.asarray(noise(*photograph)) // 2,
            evaluation_view(photograph, (16, 16), 0.9),
        )
        for photograph in PHOTOGRAPHS
    ]
    whole = [show(*case, "bicubic") for case in cases]
    monkeypatch.setattr("vitprune_fast.data.resize.MAX_PIXELS", 0)
    for case, wanted in zip(cases, whole, strict=True):
        found = show(*case, "bicubic")
        assert np.abs(found.astype(int) - wanted).max() <= 2
