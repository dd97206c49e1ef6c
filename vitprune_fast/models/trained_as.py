"""What timm's train.py was called with, which it keeps in its checkpoints under ``args``."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

# classes whose making does nothing, which such a file may name
HARMLESS = [argparse.Namespace, pathlib.PosixPath]


def trained_as(path: Path) -> dict[str, Any]:
    """The arguments of a file that read_checkpoint has accepted; empty where it keeps none."""
    if path.suffix == ".safetensors":
        return {}
    try:
        # mapped, so that the weights beside them are not read again
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the format before torch 1.6, which cannot be mapped
        return {}
    kept = content.get("args") if isinstance(content, Mapping) else None
    return dict(vars(kept)) if isinstance(kept, argparse.Namespace) else {}


def as_flags(arguments: Mapping[str, Any]) -> str:
    """--model and --model-args that build what was trained; empty where it is not said."""
    name, given = arguments.get("model"), arguments.get("model_kwargs") or {}
    if not isinstance(name, str) or not isinstance(given, Mapping):
        return ""
    sizes = {key: arguments.get(key) for key in ("img_size", "in_chans", "num_classes")}
    wanted = {**{key: value for key, value in sizes.items() if value is not None}, **given}
    words = " ".join(f"{key}={value}" for key, value in wanted.items())
    return f"--model {name}" + (f" --model-args {words}" if words else "")


def pixels(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics and crop that were asked for, as a ``pretrained_cfg`` has them."""
    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        value = arguments.get(name)
        if isinstance(value, list | tuple) and value and all(map(_is_number, value)):
            found[name] = tuple(map(float, value))
    if any(value <= 0 for value in found.get("std", ())):
        del found["std"]
    crop, how = arguments.get("crop_pct"), arguments.get("interpolation")
    if _is_number(crop) and 0 < crop <= 1:
        found["crop_pct"] = float(crop)
    if how in ("nearest", "bilinear", "bicubic", "lanczos"):
        found["interpolation"] = how
    return found


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)
