"""Data that fits a model, and all that a stage needs when it runs alone."""

from __future__ import annotations

from torch import nn

import vitprune_fast as vp
from vitprune_fast.data import ImageData, open_data
from vitprune_fast.recipes import models
from vitprune_fast.recipes.config import DataConfig, ModelConfig
from vitprune_fast.recipes.profile import choose_profile
from vitprune_fast.recipes.stages import Setting


def open_model_data(source: str, model: nn.Module, seed: int) -> ImageData:
    """The data set, read at the size and number of channels the model was built for."""
    channels, height, width = vp.describe(model).input_size
    return open_data(source, image_size=(height, width), channels=channels, seed=seed)


def open_both(
    model_config: ModelConfig, data_config: DataConfig, seed: int, device: str
) -> tuple[nn.Module, ImageData, Setting]:
    """The model with its weights, the data read at its input size, and where to compute.

    Raises:
        InvalidInput: the head and the data disagree on the number of classes, or either cannot be
            opened.
    """
    profile = choose_profile(device, workers=data_config.workers)
    model = models.open_model(model_config)
    data = open_model_data(data_config.source, model, seed)
    models.check_classes(model, data.classes, model_config.name)
    return model, data, Setting(seed, profile.device, profile.workers, data_config.augment)
