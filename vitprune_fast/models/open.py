"""From a model's name to a model with weights: every way this can go wrong is one sentence."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from vitprune_fast.config.model import ModelConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.models.checkpoint import Fitted, fit, read_checkpoint
from vitprune_fast.models.lora import Adapter, read_adapter
from vitprune_fast.models.trained_as import pixels, trained_as
from vitprune_fast.saved_models import load
from vitprune_fast.stated import caveats, stated_config


def skeleton(config: ModelConfig, classes: int | None = None) -> nn.Module:
    """The model without memory for its weights: enough to read sizes and check the family.

    Nothing is downloaded for it; what it says of its images and classes is what it says with them.

    Args:
        config: as for ``open_model``.
        classes: as there.

    Raises:
        InvalidInput: unknown name (near matches are shown) or arguments it does not take.
    """
    if config.origin == "saved":
        return open_model(config)
    return _Parts.read(config, classes).create(filled=False)


def open_model(config: ModelConfig, classes: int | None = None) -> nn.Module:
    """The model with its weights, in evaluation mode, on the CPU.

    What had to be done to a checkpoint stands in the model's ``caveats``.

    Args:
        config: a name of timm with arguments, or a folder made by `vp.save`.
        classes: size of the head. One of another size in the checkpoint stays unused, and the
            model's is new; unset, the checkpoint's own decides. ``num_classes`` among the arguments
            comes before both.

    Raises:
        InvalidInput: unknown model, bad arguments, or a checkpoint or LoRA of another shape.
        DamagedFile: the checkpoint is no tensor file (pickled code is never executed).
    """
    if config.origin == "saved":
        if config.args or config.checkpoint or config.pretrained:
            raise InvalidInput(
                f"model: the folder {config.name} holds its own weights and sizes; "
                "drop --model-args, --checkpoint and --pretrained"
            )
        model: Any = load(config.name)
        if config.merge_lora is not None:
            read_adapter(config.merge_lora).merge(model)
            model.caveats = {**caveats(model), "lora": _merged(config.merge_lora)}
        return model.eval()
    parts = _Parts.read(config, classes)
    model = parts.create()
    if parts.weights is not None:
        model.load_state_dict(parts.weights.tensors, strict=False)
    if parts.adapter is not None:
        parts.adapter.merge(model)
    return model.eval()


@dataclass(frozen=True)
class _Parts:
    """What a model of timm is made of.

    Attributes:
        config: names it.
        extra: further arguments of its constructor.
        weights: of the checkpoint, by the model's names; None without one.
        adapter: to be added to them; None without one.
        notes: caveats that come of them.
        shown: how images were shown to it, as its file says.
    """

    config: ModelConfig
    extra: Mapping[str, Any]
    weights: Fitted | None
    adapter: Adapter | None
    notes: Mapping[str, str]
    shown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: ModelConfig, classes: int | None) -> _Parts:
        """Reads the files and chooses the size of the head."""
        if config.merge_lora is not None and config.origin == "random":
            raise InvalidInput(
                f"model: merge-lora must come with the weights that it was trained on, got none "
                f"for {config.name}; give --pretrained or --checkpoint FILE"
            )
        adapter = read_adapter(config.merge_lora) if config.merge_lora is not None else None
        source, weights, notes = config.checkpoint, None, {}
        if source is not None:
            weights = fit(_create(config, {}, filled=False), read_checkpoint(source), source)
        if adapter is not None:
            notes["lora"] = _merged(adapter.folder)
        asked = config.args.get("num_classes", classes)
        brought = adapter and adapter.classes("head")
        own = brought or (weights and weights.classes)
        size = own if asked is None else asked
        extra = {} if size is None else {"num_classes": size}
        if weights is None or source is None:
            return cls(config, extra, None, adapter, notes)
        changes = [*weights.changes]
        if weights.classes not in (None, size):
            if "num_classes" in config.args and not brought:
                raise InvalidInput(
                    f"model: checkpoint {source} was trained for {own} classes, but {size} are "
                    "needed; give data or a checkpoint with the same classes"
                )
            changes.append(f"its head of {weights.classes} classes is left out")
            weights = weights.headless()
        if weights.classes is None and not brought:
            notes["head"] = "random"
        if changes:
            notes["checkpoint"] = f"{source}: {'; '.join(changes)}"[:1000]
        shown = pixels(trained_as(source))
        if shown:
            rest = f"the rest timm's for {config.name}, which the checkpoint need not share"
            notes["pixels"] = f"{', '.join(shown)} of the checkpoint's arguments, {rest}"
        return cls(config, extra, weights, adapter, notes, shown)

    def create(self, *, filled: bool = True) -> Any:
        """The model with timm's weights or fresh ones, or without memory for them."""
        model: Any = _create(self.config, self.extra, filled=filled)
        model.caveats = {**caveats(model), **self.notes}
        if self.shown:
            tested = {"test_crop_pct": self.shown["crop_pct"]} if "crop_pct" in self.shown else {}
            model.pretrained_cfg = {**stated_config(model), **self.shown, **tested}
        return model


def _merged(folder: Path) -> str:
    return f"{folder} is added to the weights"


def _create(config: ModelConfig, extra: Mapping[str, Any], *, filled: bool = True) -> nn.Module:
    name = config.name
    # "vit_tiny_patch16_224.augreg_in21k": the tag after the dot picks pretrained weights
    if not timm.is_model(name.partition(".")[0]):
        near = _near(name)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
        raise InvalidInput(f"model: {name!r} is neither a model of timm nor a folder{hint}")
    arguments = {**config.args, **extra}
    try:
        with warnings.catch_warnings(), nullcontext() if filled else torch.device("meta"):
            warnings.simplefilter("ignore")
            pretrained = config.pretrained and filled
            model: Any = timm.create_model(name, pretrained=pretrained, **arguments)
    except InvalidInput:
        raise
    except Exception as error:
        # timm and the hub raise anything from KeyError to URLError here
        reason = " ".join(str(error).split()) or type(error).__name__
        shown = " ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
        raise InvalidInput(f"model: cannot create {name} with {shown}: {reason}") from error
    guess = f"timm's for {name}, which the checkpoint need not share"
    notes = {"random": {"weights": "random"}, "checkpoint": {"pixels": guess}}
    model.caveats = notes.get(config.origin, {})
    if config.origin == "pretrained":
        _name_classes(model)
        model.derived_from = _home_of_weights(model)
    return model


def _near(name: str) -> list[str]:
    """Names of timm that may be meant, also where only the beginning of one was typed."""

    def distance(other: str) -> tuple[float, int, int]:
        ratio = difflib.SequenceMatcher(None, other[: len(name)], name).ratio()
        # of equally near ones, names that begin alike
        apart = [mine != theirs for mine, theirs in zip(name, other, strict=False)]
        return -ratio, -[*apart, True].index(True), len(other)

    near = {other: distance(other) for other in timm.list_models() if name}
    return sorted((each for each in near if near[each][0] <= -0.6), key=near.__getitem__)[:4]


def _home_of_weights(model: Any) -> dict[str, str]:
    """Where timm took the weights from, and under which license, as far as it says so."""
    stated = stated_config(model)
    home = {
        "weights": stated.get("hf_hub_id") or stated.get("url"),
        "license": stated.get("license"),
    }
    return {name: text for name, text in home.items() if isinstance(text, str) and text}


def _name_classes(model: Any) -> None:
    """Note what the outputs of timm's weights are called, which for ImageNet timm knows by number.

    A head of another size is a fresh one.
    """
    stated = stated_config(model)
    subset = infer_imagenet_subset(stated)
    if subset and stated["num_classes"] == model.num_classes and not stated.get("label_names"):
        model.pretrained_cfg = {**stated, "label_names": ImageNetInfo(subset).label_names()}
