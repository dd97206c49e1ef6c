"""Complete configurations for a kind of images, which a recipe, a YAML file and flags change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import DataConfig, RunConfig, ScoreConfig
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.by_name import named

if TYPE_CHECKING:
    from vitprune_fast.run.step import Recipe

DIGITS = RunConfig(
    out=Path("runs/digits"),
    model=ModelConfig(
        name="vit_tiny_patch16_224",
        args={
            "img_size": 8,
            "patch_size": 2,
            "in_chans": 1,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            # at this size averaging the tokens and wider initial weights learn much faster
            "class_token": False,
            "global_pool": "avg",
            "weight_init": "jax",
        },
    ),
    data=DataConfig(source="digits", batch_size=32),
    score=ScoreConfig(samples=1019),
    train_dense=True,
    dense=DistillConfig(epochs=150, lr=2e-3, warmup_epochs=5),
    distill=DistillConfig(epochs=30, warmup_epochs=1, keep="best"),
    # matrices this small gain little from a second thread, and one thread gives the same bits
    # however many cores a machine has
    threads=1,
)
"""The embedded digits: no download, no GPU, a few minutes on two cores."""

IMAGES = RunConfig(
    out=Path("runs/images"),
    model=ModelConfig(name="vit_tiny_patch16_224"),
    data=DataConfig(source="folder:PATH"),
    dense=DistillConfig(epochs=50, lr=1e-3),
    # never worse on validation images than before it was taught
    distill=DistillConfig(epochs=10, warmup_epochs=1, keep="best"),
)
"""A folder of images and a trained model."""

PRESETS = {"digits": DIGITS, "images": IMAGES}


def preset(name: str, recipe: Recipe | str | None = None) -> RunConfig:
    """The configuration of this name, with the settings of a recipe; None is that of the preset.

    Raises:
        InvalidInput: there is no such preset or recipe.
    """
    if name not in PRESETS:
        raise InvalidInput(f"run: preset must be one of {', '.join(PRESETS)}, got {name!r}")
    if recipe is None:
        return replace(PRESETS[name])
    found = named(recipe) if isinstance(recipe, str) else recipe
    return from_plain({**found.settings, "recipe": found.name}, PRESETS[name])
