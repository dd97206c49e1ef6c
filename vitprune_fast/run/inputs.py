"""Data that fits a model, and all that a verb needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import timm
from torch import nn

from vitprune_fast.bare import bare
from vitprune_fast.batches import classes_of
from vitprune_fast.config.model import ModelConfig, StudentConfig
from vitprune_fast.config.run import DataConfig, RunConfig, ShownConfig
from vitprune_fast.data import CROP_MODES, INTERPOLATIONS, ImageData, open_data
from vitprune_fast.distill.teachers import must_learn
from vitprune_fast.errors import InvalidInput
from vitprune_fast.models.open import open_model, skeleton
from vitprune_fast.precision import Precision
from vitprune_fast.randomness import seeded
from vitprune_fast.run.actions import Setting
from vitprune_fast.run.assumptions import (
    about_classes,
    about_data,
    about_weights,
    compared_classes,
    not_followed,
)
from vitprune_fast.run.profile import choose_profile
from vitprune_fast.stated import (
    built_for,
    caveats,
    name_classes,
    patch_size,
    published_size,
    stated_config,
)
from vitprune_fast.structure import describe


@dataclass(frozen=True)
class Opened:
    """What a verb works with.

    Attributes:
        model: with its weights, in evaluation mode.
        data: read at the model's input size.
        setting: seed, where to compute, and how images are read.
        assumptions: topic -> what was taken for granted.
    """

    model: Any
    data: ImageData
    setting: Setting
    assumptions: dict[str, str]


class Shown(Protocol):
    """What a model has to know of a data set."""

    @property
    def classes(self) -> Sequence[Any]: ...
    @property
    def channels(self) -> int: ...
    @property
    def image_size(self) -> tuple[int, int]: ...


_STATISTICS = {
    "mean": "mean",
    "std": "std",
    "crop_share": "crop_pct",
    "crop_mode": "crop_mode",
    "interpolation": "interpolation",
}
"""How pixels become a model's input: our names and timm's."""


def open_model_data(config: ShownConfig, model: Any, weights: ModelConfig) -> ImageData:
    """The data set as the model wants to see it.

    Args:
        config: which data; pixel statistics given there win.
        model: decides size and channels, and where it is trained also the pixel statistics.
        weights: where the model comes from.
    """
    channels, height, width = describe(model).input_size
    random = weights.origin == "random"
    own = {} if random else _own_statistics(model, (channels, height, width))
    given = {name: getattr(config, name) for name in _STATISTICS}
    known = {name: value for name, value in own.items() if given[name] is None}
    # the digits are shown whole and as they are
    if config.source == "digits":
        known = {name: known[name] for name in ("mean", "std") if name in known}
    data = open_data(
        config.source,
        image_size=(height, width),
        channels=channels,
        max_bad=config.max_bad,
        validation=config.validation,
        **{**given, **known},
    )
    stated_by = "of the saved model" if weights.origin == "saved" else f"timm's for {weights.name}"
    origin = caveats(model).get("pixels", stated_by)
    return replace(data, origins={**data.origins, **dict.fromkeys(known, origin)})


def _own_statistics(model: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What a trained model says of its own input of this (C, H, W), as far as we support it."""
    stated = stated_config(model)
    if published_size(model) == shape[1:]:
        stated |= {"crop_pct": stated.get("test_crop_pct") or stated.get("crop_pct")}
    own = {name: stated[key] for name, key in _STATISTICS.items() if stated.get(key) is not None}
    for name in ("mean", "std"):
        if name in own:
            own[name] = tuple(own[name])
    # a configuration made for colour says nothing about grey images
    of_channels = {len(own.get("mean", ())), len(own.get("std", ()))} == {shape[0]}
    follows = {
        **{"mean": of_channels, "std": of_channels},
        "crop_mode": own.get("crop_mode") in CROP_MODES,
        "interpolation": own.get("interpolation") in INTERPOLATIONS,
    }
    return {name: value for name, value in own.items() if follows.get(name, True)}


def remember_normalisation(model: Any, data: ImageData, *, trained: bool) -> None:
    """Writes down in the model, the way timm does, how its images must be prepared.

    Nothing is random or a guess any more about a model that was trained on such images, and what
    was given is no guess.
    """
    stated = stated_config(model)
    replaced = ("interpolation", "test_input_size", "test_crop_pct")
    model.pretrained_cfg = {
        **{name: value for name, value in stated.items() if name not in replaced},
        "input_size": (data.channels, *data.image_size),
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_share,
        "crop_mode": data.crop_mode,
        "num_classes": len(data.classes),
        **({"interpolation": data.interpolation} if data.interpolation in INTERPOLATIONS else {}),
    }
    kept = caveats(model)
    if trained:
        name_classes(model, data.classes)
        kept = {}
    elif data.origins["mean"] == "given":
        kept.pop("pixels", None)
    model.caveats = kept


def check_fit(model: Any, data: ImageData, *, labels: bool = True) -> None:
    """Refuses a head or a patch size that does not fit the data (InvalidInput).

    A head that names its classes must have those of the data, in their order; without ``labels`` it
    may have any.
    """
    model, classes = bare("model", model), len(data.classes)
    if labels and classes_of(model) != classes:
        raise InvalidInput(
            f"model: the head must have {classes} classes like {data.name}, got "
            f"{classes_of(model)}; build it with num_classes={classes}, or teach it those "
            "of the data (--train-dense with --pretrained or --checkpoint, or distill)"
        )
    if labels:
        check_order(model, data)
    # models of other libraries take images of one size, of which they say no patch
    (height, width), patch = data.image_size, patch_size(model) or (1, 1)
    if height < patch[0] or width < patch[1]:
        raise InvalidInput(
            f"data: images must be at least one patch, {patch[0]} x {patch[1]} pixels, got "
            f"{height} x {width}; give the model a larger img_size"
        )


def check_order(model: Any, data: ImageData) -> None:
    """Refuses classes in another order than the head's, as far as both can be told (InvalidInput).

    Outputs and labels are matched by their numbers, so right answers would count as wrong.
    """
    for label, ours, other in compared_classes(model, data) or ():
        if ours != other:
            raise InvalidInput(
                f"data: classes must be in the order of the model's head, got {other!r} where the "
                f"head has {ours!r} (label {label}); take the data that it was trained on, or name "
                "the classes so that they sort like that"
            )


def trains_dense(config: RunConfig, data: Shown) -> bool:
    """Whether the dense model learns the data in the run before it is cut.

    It does without weights, and with those of its name in timm or of a checkpoint that know other
    classes, or none.
    """
    if not config.has_weights:
        return True
    if not config.train_dense or config.model.origin == "saved":
        return False
    if config.model.origin == "checkpoint" or config.model.merge_lora is not None:
        model: Any = skeleton(config.model)
        return caveats(model).get("head") == "random" or classes_of(model) != len(data.classes)
    return must_learn(config.model.name, len(data.classes), pretrained=True)


def open_weights(
    config: ModelConfig, seed: int, classes: int | None = None, purpose: str = "init"
) -> nn.Module:
    """The model of `open_model`; weights that nothing provides are drawn from seed and purpose."""
    with seeded(seed, purpose):
        return open_model(config, classes)


def student_config(config: StudentConfig, data: Shown) -> ModelConfig:
    """A fresh student with classes and channels of the data, and its image size where it has one.

    Raises:
        InvalidInput: it is no model of timm, or does not take the arguments.
    """
    if not timm.is_model(config.name):
        raise InvalidInput(
            f"run: student must be a model of timm, got {config.name!r}; give --student NAME"
        )
    args = {"num_classes": len(data.classes), "in_chans": data.channels, **config.args}
    if "img_size" not in args and built_for(skeleton(ModelConfig(config.name, args))):
        args["img_size"] = data.image_size
    return ModelConfig(config.name, args)


def open_both(
    model_config: ModelConfig,
    data_config: ShownConfig,
    seed: int,
    device: str,
    threads: int | None = None,
    dtype: Precision = "auto",
    *,
    labels: bool = True,
) -> Opened:
    """The model with its weights, the data read at its input size, and where to compute.

    Args:
        model_config: which model.
        data_config: which images.
        seed: of weights that nothing provides.
        device: by name.
        threads: None is chosen.
        dtype: to compute in.
        labels: whether labels are read, so that the head must have the classes of the data.

    Raises:
        InvalidInput: the head and the data disagree on the number of classes, or either cannot be
            opened.
    """
    profile = choose_profile(device, threads, data_config.workers, dtype)
    model = open_weights(model_config, seed)
    data = open_model_data(data_config, model, model_config)
    check_fit(model, data, labels=labels)
    assumptions = {
        **about_weights(model_config, seed, model),
        **about_data(data),
        **about_classes(model, data),
        **not_followed(model, model_config, data),
    }
    images = DataConfig(**vars(data_config))
    return Opened(model, data, Setting(seed, profile, images), assumptions)
