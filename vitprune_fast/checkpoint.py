"""Saving and loading models: safetensors, JSON and checksums, never a pickle.

A saved model is a folder:

    model.safetensors    weights
    config.json          how to build it: a timm config, with our own entry "vitprune_fast"
    modeling_pruned.py   builds it with timm alone; only where plain ``timm.create_model`` cannot
    manifest.json        sha256 of every file, written last
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import Attention, ResPostBlock
from torch import Tensor, nn

from . import modeling_pruned
from .errors import DamagedFile, InvalidInput, UnsupportedArchitecture
from .files import (
    MANIFEST,
    check_manifest,
    make_folder,
    probe_folder,
    read_json,
    read_tensors,
    write_json,
    write_manifest,
    write_tensors,
    write_text,
)
from .modeling_pruned import ACTIVATIONS, MLPS, NORMS, PLAIN, Constant
from .stated import caveats, stated_config
from .structure import describe
from .structure.paths import put

FORMAT_VERSION = 1
# a line of text can ask for a block, which takes a millisecond to build
MAX_BLOCKS = 1 << 10
MAX_CAVEAT = 1 << 10
# timm's names for models that have none of their own; every argument is given, so the size in the
# name is moot
_ENTRYPOINTS = {
    "VisionTransformer": "vit_base_patch16_224",
    "VisionTransformerDistilled": "deit_base_distilled_patch16_224",
}
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
# how a model runs here and now, not what it is
_RUNTIME_ATTRIBUTES = {"training", "fused_attn", "grad_checkpointing", "weight_init_mode"}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a model so that it can be opened again without pickle and, where it can, without us.

    A model with one size for all blocks that timm's own constructor can express opens with
    ``timm.create_model("local-dir:<folder>", pretrained=True)`` (timm 1.0.23 needs
    ``checkpoint_path="<folder>/model.safetensors"`` in place of ``pretrained``); any other carries
    ``modeling_pruned.py``, which needs timm only. Files are replaced atomically, the manifest last.
    Tied parameters are tied again by :func:`load`; timm opens them as equal ones.

    Args:
        model: a supported model, pruned or not.
        folder: created if absent; a model saved there is replaced.

    Raises:
        InvalidInput: the folder holds a ``config.json`` of something else.
        RunFolderError: the folder cannot be created or written.
        UnsupportedArchitecture: a part of the model cannot be written down as plain values.
    """
    folder = Path(folder)
    check_folder(folder)
    spec = spec_of(model)
    plain = _timm_config(model, spec)
    config = {**(plain or _config(model, "vit_pruned", {})), "vitprune_fast": spec}
    make_folder(folder)
    names = ["config.json", "model.safetensors"]
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    # the file format takes no two names of one memory
    tensors |= {name: tensors[name].clone() for name in spec.get("ties", {})}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", config)
    if plain is None:
        names.append("modeling_pruned.py")
        write_text(folder / "modeling_pruned.py", inspect.getsource(modeling_pruned))
    else:
        (folder / "modeling_pruned.py").unlink(missing_ok=True)
    write_manifest(folder, names)


def check_folder(folder: str | Path) -> None:
    """Ask whether :func:`save` may write to a folder, before the work whose result goes there.

    Args:
        folder: need not be there; nothing is created.

    Raises:
        InvalidInput: it holds a ``config.json`` of something else.
        RunFolderError: it cannot be created or written.
    """
    folder = Path(folder)
    probe_folder(folder)
    path = folder / "config.json"
    if not os.path.lexists(path):
        return
    try:
        config = read_json(path)
    except DamagedFile:
        # a model whose saving or copying went wrong may be saved again
        config = None if (folder / MANIFEST).exists() else {}
    if config is not None and not (isinstance(config, dict) and "vitprune_fast" in config):
        raise InvalidInput(
            f"save: folder must be new, empty or a model saved here before, got {folder}, whose "
            "config.json is of something else; take another folder"
        )


def load(folder: str | Path) -> nn.Module:
    """Open a model written by :func:`save`.

    Every file is checked against its sha256 first; nothing in the folder is executed.

    Args:
        folder: as given to ``save``.

    Returns:
        The model on the CPU, in eval mode, with the saved dtypes; bit-equal weights.

    Raises:
        DamagedFile: a file is missing, altered or not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DamagedFile(f"load: folder must be a saved model, got {folder}, which is no folder")
    check_manifest(folder)
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder / "model.safetensors")
    spec = config.get("vitprune_fast") if isinstance(config, dict) else None
    if not isinstance(spec, dict) or spec.get("version") != FORMAT_VERSION:
        raise DamagedFile(
            f"load: {folder / 'config.json'} must describe a vitprune_fast model of version "
            f"{FORMAT_VERSION}, got {spec.get('version') if isinstance(spec, dict) else None!r}"
        )
    try:
        if len(spec["blocks"]) > MAX_BLOCKS:
            raise ValueError(f"{len(spec['blocks'])} blocks, more than {MAX_BLOCKS}")
        model = modeling_pruned.build(spec)
    except (
        # whatever a hostile description makes constructors do, the answer is one typed error
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DamagedFile(
            f"load: {folder / 'config.json'} must describe a model, got {error!r:.500}"
        ) from error
    fill(model, tensors, str(folder / "model.safetensors"))
    _tie(model, spec.get("ties", {}), folder / "config.json")
    model.pretrained_cfg = model.default_cfg = config.get("pretrained_cfg", {})
    _note_caveats(model, spec.get("caveats", {}), folder / "config.json")
    return model.eval()


def _note_caveats(model: Any, notes: Any, source: Path) -> None:
    """Give the model its caveats again.

    Raises:
        DamagedFile: they are no short texts.
    """
    texts = [*notes, *notes.values()] if isinstance(notes, dict) else [None]
    if not all(isinstance(text, str) and len(text) < MAX_CAVEAT for text in texts):
        raise DamagedFile(f"load: {source} must hold caveats as short texts, got {notes!r:.80}")
    if notes:
        model.caveats = notes


def _tie(model: nn.Module, ties: Any, source: Path) -> None:
    """Make one parameter of those that were one.

    Raises:
        DamagedFile: what is to be tied is not there, or differs.
    """
    parameters = dict(model.named_parameters())
    for name, first in ties.items() if isinstance(ties, dict) else [(ties, None)]:
        one, other = (
            parameters.get(each) if isinstance(each, str) else None for each in (first, name)
        )
        if one is None or other is None or not torch.equal(one, other):
            raise DamagedFile(
                f"load: {source} must tie parameters that are equal, got {name!s:.80} and "
                f"{first!s:.80}"
            )
        put(model, name, one)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give ``model`` (on any device, meta included) exactly these tensors.

    Raises:
        DamagedFile: names or shapes differ; the message shows the first difference.
    """
    wanted = model.state_dict()
    for name in (*wanted, *tensors):
        want = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        have = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        if want != have:
            raise DamagedFile(
                f"load: {source} must fit the model, got {have} for {name!r} where the model has "
                f"{want}"
            )
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def spec_of(model: Any) -> dict[str, Any]:
    """How to build ``model``, as plain JSON values, checked by building it once on meta.

    Raises:
        UnsupportedArchitecture: a part of the model cannot be written down so.
    """
    ties = describe(model).ties
    spec: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "class": type(model).__name__,
        "args": _constructor_args(model),
        "blocks": [_block_spec(block) for block in model.blocks],
        "feature_info": [dict(info) for info in model.feature_info],
        "attributes": {},
    }
    rebuilt = modeling_pruned.build(spec)
    spec["attributes"] = _check_same(rebuilt, model)
    notes = {"ties": ties, "caveats": caveats(model)}
    return spec | {name: note for name, note in notes.items() if note}


def _constructor_args(model: Any) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer that decide which modules there are."""
    attns = [b.attn for b in model.blocks if isinstance(getattr(b, "attn", None), Attention)]
    mlps = [b.mlp for b in model.blocks if type(getattr(b, "mlp", None)) in MLPS.values()]
    outputs = [a.proj for a in attns] + [m.fc2 for m in mlps]
    norms = [m for m in model.modules() if hasattr(m, "normalized_shape")]
    embed = model.patch_embed
    args = {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "qkv_bias": any(a.qkv.bias is not None for a in attns),
        "qk_norm": any(_present(a.q_norm) for a in attns),
        "scale_attn_norm": any(_present(a.norm) for a in attns),
        "scale_mlp_norm": any(_present(m.norm) for m in mlps),
        "proj_bias": any(o.bias is not None for o in outputs),
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": _present(model.norm_pre),
        "final_norm": _present(model.norm) or _present(model.fc_norm),
        "fc_norm": _present(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "norm_layer": _layer_spec(norms[-1], NORMS) if norms else None,
        "embed_norm_layer": _layer_spec(embed.norm, NORMS),
        "act_layer": _layer_spec(mlps[0].act, ACTIVATIONS) if mlps else None,
    }
    return args


def _present(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _block_spec(block: nn.Module) -> dict[str, Any]:
    scales = [getattr(getattr(block, f"ls{k}", None), "init_values", None) for k in (1, 2)]
    drops = [getattr(getattr(block, f"drop_path{k}", None), "drop_prob", 0.0) for k in (1, 2)]
    post_norm = isinstance(block, ResPostBlock) or getattr(block, "post_norm", False)
    return {
        "class": "ResPostBlock" if post_norm else "Block",
        "attn": _part_spec(getattr(block, "attn", None)),
        "mlp": _part_spec(getattr(block, "mlp", None)),
        "init_values": next((s for s in scales if s is not None), None),
        "drop_path": max(drops),
    }


def _part_spec(part: Any) -> dict[str, Any] | None:
    """The sizes of an attention or MLP module; None where the branch is absent."""
    if part is None:
        return None
    if isinstance(part, Constant):
        return {"constant": True}
    if isinstance(part, Attention):
        return {"heads": part.num_heads, "head_dim": part.head_dim}
    first = part.fc1_g if isinstance(part, SwiGLU) else part.fc1
    spec = {"class": type(part).__name__, "hidden": first.out_features}
    return spec | ({"gate_last": part.gate_last} if isinstance(part, GluMlp) else {})


def _layer_spec(layer: nn.Module, classes: Mapping[str, type]) -> dict[str, Any] | None:
    if not _present(layer):
        return None
    for name, cls in classes.items():
        if type(layer) is cls:
            return {"class": name} | ({"eps": layer.eps} if hasattr(layer, "eps") else {})
    raise UnsupportedArchitecture(
        f"save: layers must be among {', '.join(classes)}, got {type(layer).__name__}"
    )


def _check_same(rebuilt: nn.Module, model: nn.Module, ignore: str = "\0") -> dict[str, Any]:
    """The plain attributes (rates, scales) in which a rebuilt model still differs.

    Modules with ``ignore`` in their path are not compared.

    Raises:
        UnsupportedArchitecture: modules or tensors differ, which no attribute can mend.
    """
    ours, theirs = (
        {path: module for path, module in m.named_modules() if ignore not in path}
        for m in (rebuilt, model)
    )
    for path in (*theirs, *ours):
        have, want = (type(m.get(path)).__name__ for m in (ours, theirs))
        if have != want:
            raise UnsupportedArchitecture(
                f"save: {path} must be what its constructor makes, a {have}, got {want}"
            )
    shapes = {name: tuple(t.shape) for name, t in rebuilt.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            raise UnsupportedArchitecture(
                f"save: {name} must have the shape its constructor gives it, "
                f"{shapes.get(name, 'none')}, got {tuple(tensor.shape)}"
            )
    different = {}
    for path, module in theirs.items():
        for name, value in vars(module).items():
            if name.startswith("_") or name in _RUNTIME_ATTRIBUTES or not isinstance(value, PLAIN):
                continue
            if vars(ours[path]).get(name) != value:
                different[f"{path}.{name}" if path else name] = value
    return different


def _timm_config(model: Any, spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """A timm config that builds exactly this model, or None where timm's constructor cannot."""
    blocks = spec["blocks"]
    sizes = [(block["class"], block["attn"], block["mlp"]) for block in blocks]
    if not blocks or sizes.count(sizes[0]) < len(sizes):
        return None
    attn, mlp = blocks[0]["attn"], blocks[0]["mlp"]
    if not attn or not mlp or "heads" not in attn or mlp.get("class") != "Mlp":
        return None
    width = spec["args"]["embed_dim"]
    args = {name: value for name, value in spec["args"].items() if not name.endswith("_layer")}
    args |= {
        "depth": len(blocks),
        "num_heads": attn["heads"],
        "mlp_ratio": (mlp["hidden"] + 0.5) / width,
        "init_values": blocks[0]["init_values"],
        "attn_drop_rate": model.blocks[0].attn.attn_drop.p,
        "proj_drop_rate": model.blocks[0].attn.proj_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "drop_rate": model.head_drop.p,
    }
    own = stated_config(model).get("architecture")
    for architecture in (own, _ENTRYPOINTS[spec["class"]]):
        if isinstance(architecture, str) and timm.is_model(architecture):
            with contextlib.suppress(UnsupportedArchitecture, AssertionError, TypeError):
                with torch.device("meta"):
                    rebuilt = timm.create_model(architecture, **args)
                # drop path follows no rule of timm's after blocks went; it is off in a model opened
                # by timm
                if not _check_same(rebuilt, model, ignore="drop_path"):
                    config = _config(model, architecture, args)
                    config["pretrained_cfg"]["architecture"] = architecture
                    return config
    return None


def _config(model: Any, architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    known = stated_config(model)
    image = model.patch_embed.img_size
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
            **({"input_size": [model.patch_embed.proj.in_channels, *image]} if image else {}),
            **{name: known[name] for name in _KEPT if known.get(name) is not None},
        },
    }
