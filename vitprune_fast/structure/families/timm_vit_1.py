"""Descriptions of version 1, which knew timm's Vision Transformers alone, as those of version 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.layers
from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from ...modules.norms import NORMS
from . import qualified

MAX_BLOCKS = 1 << 10
_CLASSES: dict[str, type[nn.Module]] = {
    **NORMS,
    **{cls.__name__: cls for cls in (Mlp, GluMlp, SwiGLU, Block, ResPostBlock)},
    **{cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)},
    "torch.GELU": nn.GELU,
    "torch.ReLU": nn.ReLU,
    "torch.SiLU": nn.SiLU,
    "GELU": timm.layers.GELU,
    "GELUTanh": timm.layers.GELUTanh,
    "QuickGELU": timm.layers.QuickGELU,
}
_PARTS = {"attn": ("norm1", "ls1", "drop_path1"), "mlp": ("norm2", "ls2", "drop_path2")}


def as_version_2(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same model in the words of version 2, where sizes are those of the tensors.

    Raises:
        ValueError: more blocks than ``MAX_BLOCKS``, or blocks of several classes. A spec that is
            none raises LookupError, TypeError or AttributeError.
    """
    blocks, args = spec["blocks"], dict(spec["args"])
    if len(blocks) > MAX_BLOCKS:
        raise ValueError(f"{len(blocks)} blocks, more than {MAX_BLOCKS}")
    for name in ("norm_layer", "embed_norm_layer", "act_layer"):
        args[name] = args[name] and {**args[name], "class": _name(args[name]["class"])}
    mlps = [block["mlp"] for block in blocks if block["mlp"] and "class" in block["mlp"]]
    scales = [block["init_values"] for block in blocks]
    kinds = {"block_fn": {block["class"] for block in blocks} or {"Block"}}
    kinds["mlp_layer"] = {mlp["class"] for mlp in mlps} or {"Mlp"}
    if any(len(kind) > 1 for kind in kinds.values()):
        raise ValueError("blocks of several classes")
    args |= {name: {"class": _name(*kind)} for name, kind in kinds.items()}
    gates = {mlp["gate_last"] for mlp in mlps if "gate_last" in mlp}
    args["mlp_layer"] |= {"gate_last": gates.pop()} if gates else {}
    args |= {
        "depth": len(blocks),
        "num_heads": 1,
        # an even width suits packed gates too
        "mlp_ratio": 2.0,
        "init_values": next((scale for scale in scales if scale), None),
        "weight_init": "skip",
    }
    new: dict[str, Any] = {
        "version": 2,
        "class": _name(spec["class"]),
        "args": args,
        "swaps": {},
        "halves": {},
        "attributes": {"feature_info": spec["feature_info"]},
    }
    for number, block in enumerate(blocks):
        _note_block(new, f"blocks.{number}", block)
    new["attributes"] |= spec["attributes"]
    return new | {name: spec[name] for name in ("ties", "caveats") if name in spec}


def _note_block(new: dict[str, Any], path: str, block: Mapping[str, Any]) -> None:
    """What a block is beside what timm's constructor gives it."""
    held = [name for name in _PARTS if block[name]]
    for name in held:
        part, core = block[name], f"{path}.{name}"
        _, scale, drop = _PARTS[name]
        if block["drop_path"]:
            new["swaps"][f"{path}.{drop}"] = qualified(DropPath)
            new["attributes"][f"{path}.{drop}.drop_prob"] = block["drop_path"]
        if new["args"]["init_values"] and block["class"] == "Block":
            _note_scale(new, f"{path}.{scale}", block["init_values"])
        if part.get("constant"):
            new["swaps"][core] = "Constant"
        elif "heads" in part:
            heads, width = part["heads"], part["head_dim"]
            if not type(heads) is type(width) is int:
                raise TypeError(f"{core} has no sizes")
            sizes = {"num_heads": heads, "head_dim": width, "attn_dim": heads * width}
            sizes["scale"] = width**-0.5
            normed = {"q_norm": width, "k_norm": width} if new["args"]["qk_norm"] else {}
            normed |= {"norm": heads * width} if new["args"]["scale_attn_norm"] else {}
            sizes |= {f"{norm}.normalized_shape": [over] for norm, over in normed.items()}
            new["attributes"] |= {f"{core}.{name}": size for name, size in sizes.items()}
        elif new["args"]["scale_mlp_norm"]:
            hidden = part["hidden"] // 2 if part["class"] == "GluMlp" else part["hidden"]
            new["attributes"][f"{core}.norm.normalized_shape"] = [hidden]
    if len(held) == 1:
        (core,) = held
        norm, scale, drop = _PARTS[core]
        is_post = block["class"] == "ResPostBlock"
        chain = [core, norm] if is_post else [norm, core, scale]
        new["halves"][path] = {"chain": [*chain, drop], "core": core}


def _note_scale(new: dict[str, Any], path: str, value: float | None) -> None:
    if value:
        new["attributes"][f"{path}.init_values"] = value
    else:
        new["swaps"][path] = qualified(nn.Identity)


def _name(short: str) -> str:
    return qualified(_CLASSES[short])
