"""What models state of their images, whatever library or kind they are of."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitprune_fast.stated import fixed_size, image_channels, image_shape, misfit, patch_size


def made(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def with_grey_patches() -> Any:
    model = made("vit_tiny_patch16_224")
    model.patch_embed.proj = nn.Conv2d(1, 192, 16, 16)
    return model


MODELS: dict[str, Any] = {
    "fixed": lambda: made("vit_tiny_patch16_224"),
    "not square": lambda: made("vit_tiny_patch16_224", img_size=(32, 64)),
    "any size": lambda: made("vit_tiny_patch16_224", dynamic_img_size=True),
    "padded": lambda: made("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True),
    "grey": with_grey_patches,
    "on a CNN": lambda: made("vit_tiny_r_s16_p8_224"),
    "patches that overlap": lambda: made("pvt_v2_b0"),
    "patches in steps": lambda: made("xcit_nano_12_p16_224"),
    "another embedding": lambda: made("efficientvit_m0"),
    "CNN": lambda: made("regnety_002"),
    "not of images": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("fixed", (3, 224, 224), ""),
        ("fixed", (3, 256, 256), "3, 224, 224"),
        ("fixed", (1, 224, 224), "3, 224, 224"),
        ("not square", (3, 32, 64), ""),
        ("not square", (3, 64, 32), "3, 32, 64"),
        ("any size", (3, 32, 48), ""),
        ("any size", (3, 32, 40), "3, multiples of 16, multiples of 16"),
        ("padded", (3, 5, 7), ""),
        ("padded", (3, 0, 7), "3, H, W"),
        ("grey", (1, 224, 224), ""),
        ("grey", (3, 224, 224), "1, 224, 224"),
        ("patches that overlap", (3, 256, 256), ""),
        ("patches that overlap", (1, 256, 256), "3, H, W"),
        # taken at their word
        *((name, (1, 5, 7), "") for name in ("on a CNN", "patches in steps", "another embedding")),
        *((name, (1, 5, 7), "") for name in ("CNN", "not of images")),
    ],
)
def test_images_that_a_model_does_not_take(
    name: str, shape: tuple[int, int, int], wanted: str
) -> None:
    assert misfit(MODELS[name](), shape) == wanted


@pytest.mark.parametrize(
    ("name", "fixed", "shape"),
    [
        ("fixed", (224, 224), (3, 224, 224)),
        ("not square", (32, 64), (3, 32, 64)),
        ("any size", None, (3, 224, 224)),
        ("CNN", None, (3, 224, 224)),
        ("not of images", None, (None, None, None)),
    ],
)
def test_sizes(name: str, fixed: Any, shape: Any) -> None:
    model = MODELS[name]()
    assert fixed_size(model) == fixed and image_shape(model) == shape
    assert image_channels(model) == shape[0]


def test_patches() -> None:
    assert patch_size(MODELS["fixed"]()) == (16, 16)
    assert patch_size(MODELS["CNN"]()) is patch_size(MODELS["not of images"]()) is None
