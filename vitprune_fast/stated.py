"""What a model says about itself in timm's attributes, also one of no known family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

# of timm's pretrained_cfg: how images are prepared, and what the outputs mean
PREPARED = (
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "test_input_size",
    "test_crop_pct",
    "label_names",
    "label_descriptions",
)


def stated_config(model: Any) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a model as a mapping: input size, mean, std ...; empty without one.

    Timm keeps it as a dict, and has an object of its own for it.
    """
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    return dict(known.to_dict() if hasattr(known, "to_dict") else known)


def prepared(model: Any) -> dict[str, Any]:
    """What the ``pretrained_cfg`` of any model says of its images and outputs."""
    known = stated_config(model)
    return {name: known[name] for name in PREPARED if known.get(name) is not None}


def caveats(model: Any) -> dict[str, str]:
    """Notes about a model that are saved and loaded with it.

    ``weights``: they are random. ``head``: its weights are. ``checkpoint``, ``lora``: what was done
    to trained weights so that they fit. ``pixels``: where statistics come from that are a guess.
    """
    return dict(getattr(model, "caveats", {}))


def derived_from(model: Any) -> dict[str, str]:
    """Where the weights of a model were taken from, which is saved and loaded with it.

    ``weights``: their name on the hub, or an address; ``license``: of these. Empty where nobody
    noted it: that a configuration of timm names weights does not say that a model has them.
    """
    noted = getattr(model, "derived_from", None)
    if noted is not None:
        return dict(noted)
    # transformers notes it in from_pretrained, for a folder as well
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return {"weights": name} if of_hub else {}


def patch_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of a patch in pixels; None where nothing says so."""
    # of timm; torchvision; transformers
    for part in (getattr(model, "patch_embed", None), model, getattr(model, "config", None)):
        patch = getattr(part, "patch_size", None)
        if patch is not None:
            return _pair(patch)
    return None


def image_channels(model: Any) -> int | None:
    """Channels of the images a model takes; None where nothing says so."""
    stated = getattr(model, "in_chans", None)
    if stated is not None:
        return int(stated)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def image_shape(model: Any) -> tuple[int | None, int | None, int | None]:
    """(channels, height, width) of the images a model was made for; None where nothing says so."""
    channels, height, width = stated_config(model).get("input_size") or (None, None, None)
    height, width = built_for(model) or (height, width)
    return image_channels(model) or channels, height, width


def class_names(model: Any) -> tuple[str, ...] | None:
    """What the outputs of a model are called, in their order; None where nothing says so.

    Timm has ``label_names``, transformers ``id2label``, which by default only numbers them.
    """
    names: Any = stated_config(model).get("label_names")
    if names is None:
        by_number = getattr(getattr(model, "config", None), "id2label", None) or {}
        names = [by_number.get(number) for number in range(len(by_number))]
        if names == [f"LABEL_{number}" for number in range(len(names))]:
            return None
    known = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if known and names else None


def name_classes(model: Any, names: Sequence[str]) -> None:
    """Note in a model what its outputs are called, where timm and transformers do."""
    stated = stated_config(model)
    # of other classes
    stated.pop("label_descriptions", None)
    model.pretrained_cfg = {**stated, "label_names": list(names)}
    config: Any = getattr(model, "config", None)
    if hasattr(config, "id2label"):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def published_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of the images its published accuracy is of, where that is said apart.

    The model need not be built for them.
    """
    size = stated_config(model).get("test_input_size")
    return None if size is None else (int(size[-2]), int(size[-1]))


def built_for(model: Any) -> tuple[int, int] | None:
    """(height, width) of images by which a model sized its parts; None where none has a size."""
    return _made_for(model)[0]


def fixed_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of the only images a model takes; None where it takes others too."""
    size, embed = _made_for(model)
    free = getattr(model, "dynamic_img_size", False)
    return None if free or not getattr(embed, "strict_img_size", True) else size


def misfit(model: Any, shape: Sequence[int]) -> str:
    """The ``C, H, W`` that a ViT of timm takes, where those of images are others; else empty.

    A model whose first layer is no plain embedding of patches is taken at its word.
    """
    embed = getattr(model, "patch_embed", None)
    patch, proj = patch_size(model), getattr(embed, "proj", None)
    # that of a hybrid reads the features of a CNN
    if patch is None or not isinstance(proj, nn.Conv2d) or hasattr(embed, "backbone"):
        return ""
    channels, height, width = shape
    size = fixed_size(model)
    if size is not None and getattr(embed, "img_size", None) is not None:
        fits, rule = (height, width) == size, f"{size[0]}, {size[1]}"
    elif proj.stride != patch or getattr(embed, "dynamic_img_pad", False):
        fits, rule = min(height, width) > 0, "H, W"
    else:
        fits = min(height, width) > 0 and height % patch[0] == 0 and width % patch[1] == 0
        rule = f"multiples of {patch[0]}, multiples of {patch[1]}"
    return "" if fits and channels == proj.in_channels else f"{proj.in_channels}, {rule}"


def _made_for(model: Any) -> tuple[tuple[int, int] | None, Any]:
    """The image size that a part of a model has, and the part."""
    for part in (getattr(model, "patch_embed", None), getattr(model, "stem", None), model):
        size = getattr(part, "img_size", None)
        if size is not None:
            return _pair(size), part
    return None, None


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
