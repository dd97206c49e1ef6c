"""From a model's name to a model with weights: every way this can go wrong is one sentence."""

from __future__ import annotations

import difflib
import mmap
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vitprune_fast import files
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.saved_models import load
from vitprune_fast.stated import stated_config


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
    with torch.device("meta"):
        if config.checkpoint is None and classes is not None:
            return _create(config, {"num_classes": classes, **config.args}, filled=False)
        return _create(config, _head_of_checkpoint(config), filled=False)


def open_model(config: ModelConfig, classes: int | None = None) -> nn.Module:
    """The model with its weights, in evaluation mode, on the CPU.

    Args:
        config: a name of timm with arguments, or a folder made by `vp.save`.
        classes: size of the head for a model whose weights are not given. A checkpoint's own head
            decides otherwise, and ``num_classes`` among the arguments before both.

    Raises:
        InvalidInput: unknown model, bad arguments, or a checkpoint of another shape.
        DamagedFile: the checkpoint is no tensor file (pickled code is never executed).
    """
    if config.origin == "saved":
        if config.args or config.checkpoint or config.pretrained:
            raise InvalidInput(
                f"model: the folder {config.name} holds its own weights and sizes; "
                "drop --model-args, --checkpoint and --pretrained"
            )
        return load(config.name).eval()
    if config.checkpoint is None:
        unset = classes is not None and "num_classes" not in config.args
        return _create(config, {"num_classes": classes} if unset else {}).eval()
    model = _create(config, _head_of_checkpoint(config))
    load_weights(model, read_checkpoint(config.checkpoint), config.checkpoint)
    return model.eval()


def _head_of_checkpoint(config: ModelConfig) -> dict[str, int]:
    """The number of classes the checkpoint was trained for, unless the arguments say one."""
    if config.checkpoint is None or "num_classes" in config.args:
        return {}
    tensors = read_checkpoint(config.checkpoint)
    heads = [tensors[n] for n in ("head.weight", "module.head.weight") if n in tensors]
    return {"num_classes": len(heads[0])} if heads else {}


def _create(config: ModelConfig, extra: Mapping[str, Any], *, filled: bool = True) -> nn.Module:
    name = config.name
    # "vit_tiny_patch16_224.augreg_in21k": the tag after the dot picks pretrained weights
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
        raise InvalidInput(f"model: {name!r} is neither a model of timm nor a folder{hint}")
    arguments = {**config.args, **extra}
    try:
        with warnings.catch_warnings():
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
    return model


def _name_classes(model: Any) -> None:
    """Note what the outputs of timm's weights are called, which for ImageNet timm knows by number.

    A head of another size is a fresh one.
    """
    stated = stated_config(model)
    subset = infer_imagenet_subset(stated)
    if subset and stated["num_classes"] == model.num_classes and not stated.get("label_names"):
        model.pretrained_cfg = {**stated, "label_names": ImageNetInfo(subset).label_names()}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: safetensors, or a torch file read with weights_only.

    Raises:
        InvalidInput: the file is missing.
        DamagedFile: the file holds pickled code (never executed), no tensors, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"model: checkpoint must be a file, got {path} (no such file)")
    if path.suffix == ".safetensors":
        return files.read_tensors(path)
    _refuse_bombs(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # the unpickler refuses with many types; all of them mean the same to the user
        raise DamagedFile(
            f"model: checkpoint {path} is no plain tensor file ({type(error).__name__}); nothing "
            "in it was executed: convert it to .safetensors where you trust it"
        ) from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if (isinstance(content, dict))
        else {}
    )
    if not tensors:
        raise DamagedFile(f"model: checkpoint {path} must hold named tensors, found none")
    return tensors


def _refuse_bombs(path: Path) -> None:
    """Refuse a torch file that asks for more memory than it has bytes.

    torch.save never compresses, and never writes a ``bytearray``, the one thing that torch's reader
    makes in any size a number asks for.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            bomb = content.find(b"bytearray") >= 0
            if content[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
                bomb |= any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                bomb |= sum(entry.file_size for entry in entries) > len(content)
    except Exception as error:
        # zipfile raises anything from BadZipFile to struct.error
        raise DamagedFile(
            f"model: checkpoint {path} must be a whole file, got {error}; download it again"
        ) from None
    if bomb:
        raise DamagedFile(
            f"model: checkpoint {path} must not unpack to more than its size; "
            "save it again with torch.save or as .safetensors"
        )


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copies a checkpoint into the model; names and shapes must agree exactly.

    Raises:
        InvalidInput: the first missing, unknown or differently shaped tensor, and how many more.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    wanted = model.state_dict()
    head = next((n for n in ("head.weight", "head.l.weight") if n in wanted and n in tensors), None)
    if head and wanted[head].shape[0] != tensors[head].shape[0]:
        raise InvalidInput(
            f"model: checkpoint {source} was trained for {tensors[head].shape[0]} classes, but "
            f"{wanted[head].shape[0]} are needed; give data or a checkpoint with the same classes"
        )
    problems = [
        f"{name} must be {tuple(wanted[name].shape)}, got {tuple(tensors[name].shape)}"
        for name in wanted
        if name in tensors and wanted[name].shape != tensors[name].shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in wanted]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InvalidInput(
            f"model: checkpoint {source} does not fit the model: {problems[0]}{more}; "
            "check --model and --model-args"
        )
    model.load_state_dict(tensors)
