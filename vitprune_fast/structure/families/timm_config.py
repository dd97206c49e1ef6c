"""What ``config.json`` says of a saved model in timm's words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn

from ...stated import stated_config
from . import Recipe, Shape

# of timm's pretrained_cfg: how images are prepared, and what the outputs mean; not what timm says
# by name of weights that need not be these (their home, tag, license and paper)
_KEPT = (
    "architecture",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "first_conv",
    "classifier",
    "label_names",
    "label_descriptions",
)
# drop path follows no rule of timm's after blocks went; it is off in a model opened by timm
_LEFT_OUT = ("weight_init", "drop_path_rate")


def timm_configs(
    model: Any, recipe: Recipe, shape: Shape, entrypoint: str
) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """A config that timm itself may build the model from, then one that it cannot.

    Args:
        model: of a class of timm's.
        recipe: how its constructor is called; timm is told no classes.
        shape: of the images it takes.
        entrypoint: timm's name for a model that has none of its own.
    """
    args = {
        name: value
        for name, value in recipe["args"].items()
        if not (isinstance(value, dict) or name.endswith("_layer") or name in _LEFT_OUT)
    }
    architecture = stated_config(model).get("architecture") or entrypoint
    # an architecture may take fewer arguments than the class, and be of another class today
    with contextlib.suppress(AssertionError, RuntimeError, TypeError, ValueError):
        # create_model would fetch a name that is an address
        if not timm.is_model(architecture):
            raise ValueError(architecture)
        with torch.device("meta"):
            made = timm.create_model(architecture, **args)
        config = _config(model, architecture, args, shape)
        config["pretrained_cfg"]["architecture"] = architecture
        yield config, made
    yield _config(model, "vit_pruned", {}, shape), None


def _config(model: Any, architecture: str, args: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    known = stated_config(model)
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": dict(args),
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"input_size": list(shape)} if None not in shape else {}),
            **{name: known[name] for name in _KEPT if known.get(name) is not None},
        },
    }
