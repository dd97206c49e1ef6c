"""A folder for from_pretrained of transformers, which runs no code of ours."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from .. import saved_models
from ..batches import logits_of
from ..errors import UnsupportedArchitecture
from ..files import read_json
from ..model_card import UNITS
from ..stated import stated_config
from ..structure import Structure, describe, families
from ._subject import Format, Logits, Subject, check_origin

PROCESSOR = "preprocessor_config.json"
# numbers of PIL, which configs of processors hold
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def check(subject: Subject) -> None:
    """Refuse a model that no config describes, by the first thing in which its layers differ."""
    check_origin(subject, "hf", "transformers")
    _fold_temperature(subject.model)
    if (why := saved_models.why_not_alone(subject.model)) is None:
        return
    structure = describe(subject.model)
    ragged = _ragged(structure, families.of(subject.model).block_paths(subject.model))
    remedy = "plan with allocation='uniform', or " if "keeps" in ragged else ""
    width = _counts_in(subject.model)
    if width and any(axis.width % width for axis in structure.units("neuron")):
        why = f"neurons are no multiple of the width {width}, in which its config counts them"
        remedy = f"plan with allocation='uniform' and round_to={{'neuron': {width}}}, or "
    raise UnsupportedArchitecture(
        f"export: model must have layers of one size for format hf, got one where {ragged or why}; "
        f"{remedy}use onnx, pt2 or vp.save"
    )


def _fold_temperature(model: nn.Module) -> None:
    """Have queries carry the temperature of heads that lost dims: a config has no word for it."""
    for module in model.modules():
        core: Any = module
        if all(hasattr(core, name) for name in ("scaling", "head_dim", "q_proj")) and core.head_dim:
            stock = core.head_dim**-0.5
            for tensor in core.q_proj.parameters():
                tensor.mul_(core.scaling / stock)
            core.scaling = stock


def _counts_in(model: Any) -> int:
    """The width, where a config tells neurons by a whole ratio to it, as that of DINOv2; else 0."""
    counts = hasattr(model.config, "mlp_ratio") and not getattr(model.config, "use_swiglu_ffn", 0)
    return model.config.hidden_size if counts else 0


def _ragged(structure: Structure, blocks: list[str]) -> str:
    """The first axis of another size than that of the first block; empty where all are alike."""
    for kind, what in UNITS.items():
        axes = {
            block: axis
            for block in blocks
            for axis in structure.units(kind)
            if axis.name.startswith(f"{block}.")
        }
        first = next(iter(axes.values()), None)
        for block in blocks:
            axis = axes.get(block)
            if axis is None or first is None:
                return f"{block} has no {what} left"
            if axis.width != first.width:
                return f"{axis.name} keeps {axis.width}, {first.name} keeps {first.width}"
    return ""


def write(subject: Subject, path: Path) -> None:
    """Write weights, config, card, and a config of the image processor."""
    processor = _processor(subject)
    more = {PROCESSOR: processor} if processor else {}
    saved_models.write(subject.model, path, subject.results, more)


def _processor(subject: Subject) -> dict[str, Any] | None:
    """How images are prepared, where the model says it; a guess would be wrong in silence."""
    stated = stated_config(subject.model)
    if stated.get("mean") is None or stated.get("std") is None:
        return None
    height, width = subject.shape[1:]
    share, mode = stated.get("crop_pct") or 1.0, stated.get("crop_mode") or "center"
    sides = {"height": int(height / share), "width": int(width / share)}
    if mode not in ("center", "squash"):
        return None
    if mode == "center" and height == width:
        sides = {"shortest_edge": sides["height"]}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": subject.shape[0] == 3,
        "do_resize": True,
        "size": sides,
        "resample": _RESAMPLING.get(stated.get("interpolation") or "bicubic", 3),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(stated["mean"]),
        "image_std": list(stated["std"]),
    }


def opened(path: Path) -> Logits:
    """By the class that the config names, without remote code."""
    name = read_json(path / "config.json")["architectures"][0]
    transformers: Any = importlib.import_module("transformers")
    shows = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        cls = getattr(transformers, name)
        model = cls.from_pretrained(path, local_files_only=True, dtype="auto").eval()
    finally:
        if shows:
            transformers.utils.logging.enable_progress_bar()
    return lambda images: logits_of(model(images))


FORMAT = Format(write, opened, check=check)
