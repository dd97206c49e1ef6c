"""Build a pruned ViT from its ``config.json`` with timm alone.

A copy of this file lies beside every saved model that plain ``timm.create_model`` cannot express
(blocks of different size, heads narrower or fewer than the width suggests, missing branches):

    from modeling_pruned import load
    model = load("folder of this file")

It needs torch, timm and safetensors, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm.layers
import torch
from safetensors.torch import load_file
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

MODELS = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}
BLOCKS = {cls.__name__: cls for cls in (Block, ResPostBlock)}
MLPS = {cls.__name__: cls for cls in (Mlp, GluMlp, SwiGLU)}
# the classes a config may name; anything else is refused, nothing is looked up by name elsewhere
NORMS = {
    "torch.LayerNorm": nn.LayerNorm,
    "LayerNorm": timm.layers.LayerNorm,
    "RmsNorm": timm.layers.RmsNorm,
}
ACTIVATIONS = {
    "torch.GELU": nn.GELU,
    "torch.ReLU": nn.ReLU,
    "torch.SiLU": nn.SiLU,
    "GELU": timm.layers.GELU,
    "GELUTanh": timm.layers.GELUTanh,
    "QuickGELU": timm.layers.QuickGELU,
}


# what an attribute of a module may be set to from a config
PLAIN = (bool, int, float, str, type(None))


class AttentionBlock(nn.Module):
    """What is left of a transformer block that lost its MLP."""

    def __init__(self, block: Any):
        super().__init__()
        self.post_norm = isinstance(block, ResPostBlock) or getattr(block, "post_norm", False)
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.ls1 = getattr(block, "ls1", nn.Identity())

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """``x`` (B, N, C) plus the attention branch; masks are named as timm's version names them.

        That is ``attn_mask``, and ``is_causal`` where attention knows of it.
        """
        if self.post_norm:
            y = self.norm1(self.attn(x, **mask))
        else:
            y = self.ls1(self.attn(self.norm1(x), **mask))
        return x + self.drop_path1(y)


class MlpBlock(nn.Module):
    """What is left of a transformer block that lost its attention."""

    def __init__(self, block: Any):
        super().__init__()
        self.post_norm = isinstance(block, ResPostBlock) or getattr(block, "post_norm", False)
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2
        self.ls2 = getattr(block, "ls2", nn.Identity())

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """``x`` (B, N, C) plus the MLP branch; masks are for attention."""
        y = self.norm2(self.mlp(x)) if self.post_norm else self.ls2(self.mlp(self.norm2(x)))
        return x + self.drop_path2(y)


class Constant(nn.Module):
    """An emptied branch whose constant output no other tensor of the model can take over."""

    def __init__(self, bias: Tensor):
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """The bias at every token of ``x`` (B, N, C)."""
        return torch.zeros_like(x) + self.bias


def build(spec: Mapping[str, Any]) -> VisionTransformer:
    """The model of a ``spec`` (the "vitprune_fast" entry of config.json), on the meta device."""
    args, blocks = dict(spec["args"]), spec["blocks"]
    for name, classes in (
        ("norm_layer", NORMS),
        ("embed_norm_layer", NORMS),
        ("act_layer", ACTIVATIONS),
    ):
        args[name] = _layer(args[name], classes) if args[name] else None

    def block_fn(depth: int, **kwargs: Any) -> Any:
        return build_block(blocks[depth], {**kwargs, "depth": depth})

    as_class: Any = block_fn
    with torch.device("meta"):
        # one head divides every width; the blocks take their own number from the spec
        model = MODELS[spec["class"]](
            **args, depth=len(blocks), num_heads=1, block_fn=as_class, weight_init="skip"
        )
    model.feature_info = [dict(info) for info in spec["feature_info"]]
    for path, value in spec["attributes"].items():
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(parent)
        if not isinstance(vars(module).get(leaf, module), PLAIN) or not isinstance(value, PLAIN):
            raise ValueError(f"attribute {path!r} is no plain value of the model")
        setattr(module, leaf, value)
    return model


def build_block(spec: Mapping[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    """One block with the sizes of ``spec``; ``kwargs`` are those timm gives to its block class."""
    dim, attn, mlp = kwargs["dim"], spec["attn"] or {}, spec["mlp"] or {}
    kwargs |= {name: spec[name] for name in ("init_values", "drop_path")}
    # int(dim * mlp_ratio) is then exactly the hidden width
    kwargs["mlp_ratio"] = (mlp.get("hidden", 1) + 0.5) / dim
    kwargs["mlp_layer"] = partial(
        MLPS[mlp.get("class", "Mlp")], **{k: mlp[k] for k in ("gate_last",) if k in mlp}
    )
    block = BLOCKS[spec["class"]](**kwargs)
    if "heads" in attn:
        block.attn = Attention(
            dim,
            num_heads=attn["heads"],
            attn_head_dim=attn["head_dim"],
            qkv_bias=kwargs["qkv_bias"],
            qk_norm=kwargs["qk_norm"],
            scale_norm=kwargs["scale_attn_norm"],
            proj_bias=kwargs["proj_bias"],
            attn_drop=kwargs["attn_drop"],
            proj_drop=kwargs["proj_drop"],
            norm_layer=kwargs["norm_layer"],
        )
    for name, part in (("attn", attn), ("mlp", mlp)):
        if part.get("constant"):
            setattr(block, name, Constant(torch.empty(dim)))
    if not attn:
        return MlpBlock(block)
    return block if mlp else AttentionBlock(block)


def load(folder: str | Path) -> VisionTransformer:
    """The saved model of this folder, on the CPU, in eval mode.

    Its ``pretrained_cfg`` says how images are prepared, as timm's ``resolve_model_data_config``
    reads it, and which architecture was pruned.
    """
    folder = Path(folder)
    config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model: Any = build(config["vitprune_fast"])
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.pretrained_cfg = model.default_cfg = config.get("pretrained_cfg", {})
    return model.eval()


def _layer(layer: Mapping[str, Any], classes: Mapping[str, type[nn.Module]]) -> Any:
    """A layer class with its eps, from its entry in the spec."""
    return partial(classes[layer["class"]], **{k: v for k, v in layer.items() if k == "eps"})
