"""Complete configurations for a kind of images, which a recipe, a YAML file and flags change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import DataConfig, RunConfig, ScoreConfig, SweepConfig
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.by_name import DEFAULT, named

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
    distill=DistillConfig(epochs=30, warmup_epochs=1, keep="one-se"),
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
    # as good on validation images as before it was taught, or better
    distill=DistillConfig(epochs=10, warmup_epochs=1, keep="one-se"),
)
"""A folder of images and a trained model."""

SMOKE = replace(
    DIGITS,
    out=Path("runs/smoke"),
    model=replace(DIGITS.model, args={**DIGITS.model.args, "embed_dim": 32}),
    score=ScoreConfig(samples=256),
    sweep=SweepConfig(images=512),
    dense=DistillConfig(epochs=30, lr=4e-3, warmup_epochs=1),
    distill=DistillConfig(epochs=4, warmup_epochs=1, keep="one-se"),
    latency_seconds=0.1,
)
"""Every step of a recipe on the digits in less than a minute, to see that it runs."""

CIFAR = RunConfig(
    out=Path("runs/cifar"),
    model=ModelConfig(name="deit_small_patch16_224", pretrained=True),
    data=DataConfig(source="hfds:cifar10", batch_size=128, crop_scale=0.5),
    score=ScoreConfig(samples=2048),
    train_dense=True,
    dense=DistillConfig(epochs=10, lr=1e-4, warmup_epochs=1),
    distill=DistillConfig(epochs=100, lr=5e-4, lr_batch=512, keep="one-se"),
)
"""CIFAR, enlarged to the size of a model of ImageNet, which learns its classes first."""

# of Lee et al., "Vision Transformer for small-size datasets" (arXiv:2112.13492), released code
_FROM_SCRATCH = DistillConfig(
    epochs=100,
    lr=1e-3,
    warmup_epochs=10,
    drop_path=0.1,
    mixup=1.0,
    cutmix=1.0,
    mix_prob=0.5,
    label_smoothing=0.1,
    erase=0.25,
    clip_norm=0.0,
)

TINY_IMAGENET = RunConfig(
    out=Path("runs/tiny-imagenet"),
    model=ModelConfig(name="deit_small_patch16_224", args={"img_size": 64, "patch_size": 8}),
    data=DataConfig(
        source="folder:PATH", batch_size=128, crop="simple", policy="original", repeats=3
    ),
    score=ScoreConfig(samples=5000),
    train_dense=True,
    dense=_FROM_SCRATCH,
    distill=replace(_FROM_SCRATCH, keep="one-se"),
)
"""Tiny-ImageNet-200 in its own 64 pixels, by DeiT-S in patches of 8.

The model is trained here first, as Lee et al. train on these images: weights of ImageNet have seen
them.
"""

MINI_IMAGENET = replace(
    TINY_IMAGENET,
    out=Path("runs/mini-imagenet"),
    model=replace(TINY_IMAGENET.model, args={"img_size": 84, "patch_size": 12}),
    # the photographs are larger than 84 pixels
    data=replace(TINY_IMAGENET.data, crop="resized"),
)
"""Mini-ImageNet in 84 pixels, as few-shot learning shows it, by DeiT-S in patches of 12; see
``TINY_IMAGENET``."""

IMAGENET = RunConfig(
    out=Path("runs/imagenet"),
    model=ModelConfig(name="deit_base_patch16_224", pretrained=True),
    data=DataConfig(
        source="folder:PATH",
        batch_size=128,
        crop_scale=0.08,
        policy="rand-m9-mstd0.5-inc1",
        repeats=3,
    ),
    score=ScoreConfig(samples=5000),
    distill=DistillConfig(
        epochs=310,
        lr=5e-4,
        lr_batch=512,
        min_lr=1e-5,
        warmup_epochs=5,
        warmup_lr=1e-6,
        cooldown_epochs=10,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        erase=0.25,
        ema=0.99996,
        clip_norm=0.0,
    ),
)
"""ImageNet and the training of DeiT (Touvron et al. 2021, arXiv:2012.12877, table 9)."""

PRESETS = {
    "digits": DIGITS,
    "smoke": SMOKE,
    "images": IMAGES,
    "cifar": CIFAR,
    "tiny-imagenet": TINY_IMAGENET,
    "mini-imagenet": MINI_IMAGENET,
    "imagenet": IMAGENET,
}


def preset(name: str, recipe: Recipe | str = DEFAULT) -> RunConfig:
    """The configuration of this name, with the settings that a recipe has for it.

    Args:
        name: a preset, or one with a variant that the recipe has, such as ``imagenet-vit-s``.
        recipe: a recipe or its name.

    Raises:
        InvalidInput: there is no such preset or recipe.
    """
    found = named(recipe) if isinstance(recipe, str) else recipe
    base = next((each for each in PRESETS if f"{name}-".startswith(f"{each}-")), "")
    if not base or (name != base and name not in found.presets):
        known = [*PRESETS, *(own for own in found.presets if own not in PRESETS)]
        raise InvalidInput(f"run: preset must be one of {', '.join(known)}, got {name!r}")
    config = from_plain({**found.settings, "recipe": found.name}, PRESETS[base])
    for own in dict.fromkeys((base, name)):
        config = from_plain(dict(found.presets.get(own, {})), config)
    return config
