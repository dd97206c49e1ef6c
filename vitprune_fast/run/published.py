"""Which published accuracy a measured one can be compared with."""

from __future__ import annotations

from typing import Any

from vitprune_fast.config.model import ModelConfig
from vitprune_fast.data import ImageData
from vitprune_fast.data.published import Accuracy, published_accuracy
from vitprune_fast.run.assumptions import compared_classes
from vitprune_fast.stated import stated_config


def published(config: ModelConfig, model: Any, data: ImageData) -> Accuracy | None:
    """What timm published of the weights that a model was opened with, on the test split.

    None where the weights are not timm's or the model is built otherwise than for them, where the
    test split is none that ImageNet-1k brings, or where no figure is known at this size.
    """
    as_built = config.origin == "pretrained" and config.args.keys() <= {"img_size"}
    pairs = compared_classes(model, data)
    is_imagenet = bool(pairs) and all(ours == other for _, ours, other in pairs)
    if not (as_built and is_imagenet and "test" in data.own_splits):
        return None
    stated = stated_config(model)
    return published_accuracy(f"{stated['architecture']}.{stated['tag']}", data.image_size)
