"""Data that fits a model, and all that a stage needs when it runs alone."""

from __future__ import annotations

from typing import Any

from torch import nn

import vitprune_fast as vp
from vitprune_fast.data import ImageData, open_data
from vitprune_fast.randomness import seeded
from vitprune_fast.recipes import models
from vitprune_fast.recipes.config import DataConfig, ModelConfig
from vitprune_fast.recipes.profile import Profile, choose_profile
from vitprune_fast.recipes.stages import Setting


def open_model_data(config: DataConfig, model: Any, *, trained: bool) -> ImageData:
    """The data set as the model wants to see it.

    Args:
        config: which data; a mean, std or crop given there wins.
        model: decides size and channels, and where `trained` also mean, std and crop.
        trained: whether the model has weights that expect its own normalisation.
    """
    channels, height, width = vp.describe(model).input_size
    own = getattr(model, "pretrained_cfg", None) or {} if trained else {}
    mean, std = config.mean or own.get("mean"), config.std or own.get("std")
    # a configuration made for colour says nothing about grey images
    if mean is not None and std is not None and {len(mean), len(std)} != {channels}:
        mean, std = config.mean, config.std
    return open_data(
        config.source,
        image_size=(height, width),
        channels=channels,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        crop_share=config.crop_share or own.get("crop_pct") or 1.0,
    )


def remember_normalisation(model: Any, data: ImageData) -> None:
    """Writes down in the model, the way timm does, how its images must be prepared."""
    model.pretrained_cfg = {
        **(getattr(model, "pretrained_cfg", None) or {}),
        "input_size": (data.channels, *data.image_size),
        "mean": data.mean,
        "std": data.std,
        "crop_pct": getattr(data.source, "crop_share", 1.0),
        "num_classes": len(data.classes),
    }


def check_fit(model: Any, data: ImageData) -> None:
    """Refuses a head or a patch size that does not fit the data (InvalidInput)."""
    data.check_model(num_classes=model.num_classes, patch_size=model.patch_embed.patch_size)


def open_both(
    model_config: ModelConfig, data_config: DataConfig, seed: int, device: str
) -> tuple[nn.Module, ImageData, Setting]:
    """The model with its weights, the data read at its input size, and where to compute.

    Weights that come from nowhere else are drawn by the seed, as those of a run are.

    Raises:
        InvalidInput: the head and the data disagree on the number of classes, or either cannot be
            opened.
    """
    profile = choose_profile(device, workers=data_config.workers)
    with seeded(seed, "init"):
        model = models.open_model(model_config)
    data = open_model_data(data_config, model, trained=True)
    check_fit(model, data)
    return model, data, setting_of(data_config, profile, seed)


def setting_of(data_config: DataConfig, profile: Profile, seed: int) -> Setting:
    """What every stage needs besides its inputs."""
    return Setting(
        seed,
        profile.device,
        profile.workers,
        data_config.augment,
        data_config.batch_size,
        data_config.policy,
        data_config.repeats,
    )
