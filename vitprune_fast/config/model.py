"""Which model, as plain values.

A field's docstring is its `--help` text. Nothing here imports torch, so `--help` stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec


def parse_pairs(words: list[str]) -> dict[str, Any]:
    """Words such as ``key=value``, whose values are read as YAML, as a mapping."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"must look like KEY=VALUE, got {word!r}")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"must have a YAML value after {key}=, got {value!r}") from None
    return pairs


Amount = Annotated[float | None, arg(metavar="SHARE|NUMBER")]
Pairs = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE ...",
        instance_from_str=parse_pairs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda pairs: [f"{key}={value}" for key, value in pairs.items()],
    ),
]
"""A mapping typed as `key=value` words on the command line; values are read as YAML."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and where its weights come from."""

    name: Annotated[str, arg(name="model", metavar="NAME|DIR")] = "vit_tiny_patch16_224"
    """Model name of timm, or a folder written by `prune`, `distill` or `run`."""
    args: Annotated[Pairs, arg(name="model-args")] = field(default_factory=dict)
    """Arguments for the timm constructor, e.g. img_size=32 patch_size=4 embed_dim=192."""
    checkpoint: Annotated[Path | None, arg(metavar="FILE")] = None
    """Trained weights: .safetensors, or a torch file (read with weights_only, never unpickled)."""
    merge_lora: Annotated[Path | None, arg(metavar="DIR")] = None
    """Adds the LoRA in a folder of peft (adapter_config.json, adapter_model.safetensors) to the
    weights of the model."""
    pretrained: bool = False
    """Download timm's own weights for this model."""

    @property
    def origin(self) -> Literal["saved", "checkpoint", "pretrained", "random"]:
        """Where the weights come from: our own folder, a file, timm's download, or nowhere."""
        if self.name and Path(self.name).is_dir():
            return "saved"
        if self.checkpoint is not None:
            return "checkpoint"
        return "pretrained" if self.pretrained else "random"


@dataclass(frozen=True)
class StudentConfig:
    """A fresh model to teach, in a recipe that cuts none out of the dense model."""

    name: Annotated[str, arg(name="student", metavar="NAME")] = ""
    """Model name of timm; it gets random weights, and the data's classes, channels and image size.
    Unset: none."""
    args: Annotated[Pairs, arg(name="student-args")] = field(default_factory=dict)
    """Arguments for its constructor, as in model-args."""
