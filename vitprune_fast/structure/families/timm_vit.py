"""timm's VisionTransformer and VisionTransformerDistilled: ViT, DeiT, AugReg, CLIP, DINOv2.

Read it next to ``timm/models/vision_transformer.py``: every line states one fact of that file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.layers import DropPath, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import nn

from ...errors import InvalidInput, UnsupportedArchitecture
from ...modeling_pruned import HalfBlock, SlimPackedAttention
from ...stated import PREPARED, stated_config
from ..axes import Axis
from ..builder import Builder
from ..paths import get
from ..table import Structure
from . import ConstructorCall, Family, Shape, qualified
from .branches import Inner, Part, exchange
from .branches import describe_block as describe_parts

BLOCKS = (Block, ResPostBlock, HalfBlock)
ATTENTIONS = (Attention, SlimPackedAttention)


def describe(model: Any, image: tuple[int, int] | None) -> Structure:
    """The table of a ViT whose input is ``image`` (height, width); None is its own size."""
    height, width = image or image_size(model)
    num_patches = patches_in(model, height, width)
    tokens = num_patches + model.num_prefix_tokens
    pooled = tokens if model.global_pool == "" else 1

    t = Builder(model, type(model).__name__, (model.patch_embed.proj.in_channels, height, width))
    embed = t.axis("embed", model.embed_dim, "embed")
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        t.tensor(name, 1, ..., embed)
    t.linear("patch_embed.proj", embed, model.patch_embed.proj.in_channels, num_patches)
    for name in ("patch_embed.norm", "norm_pre", "norm", "fc_norm"):
        t.norm(name, embed)
    for name in ("head", "head_dist"):
        t.linear(name, model.num_classes, embed, pooled)
    t.attr("", embed_dim=embed, num_features=embed, head_hidden_size=embed)
    t.stem(embed, *covering(t, model))
    for name in ("patch_embed.norm", "norm_pre"):
        t.writer_norm(embed, name)
    for i, block in enumerate(model.blocks):
        describe_block(t, f"blocks.{i}", block, embed, tokens)
        t.attr(f"feature_info.{i}", num_chs=embed)
    if has_norm(model.norm) or has_norm(model.fc_norm):
        t.reader(embed, "head", "norm" if has_norm(model.norm) else "fc_norm")
    else:
        for name in ("head", "head_dist"):
            if t.has(f"{name}.weight"):
                t.reader(embed, name)
    t.branch_axes()
    return t.finish()


def describe_block(t: Builder, path: str, block: Any, embed: Axis, tokens: int) -> None:
    """Attention and MLP, each a branch of the residual stream."""
    if type(block) not in BLOCKS:
        raise UnsupportedArchitecture(
            f"describe: {path} must be one of {', '.join(b.__name__ for b in BLOCKS)}, "
            f"got {type(block).__name__}"
        )
    parts = (
        Part("attn", "attn_branch", "norm1", attention, "ls1.gamma", "drop_path1"),
        Part("mlp", "mlp_branch", "norm2", mlp, "ls2.gamma", "drop_path2"),
    )
    describe_parts(t, path, parts, embed, tokens, post_norm=_is_post_norm(block))


def attention(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Fused qkv; the stock class has one head_dim for q, k and v."""
    attn: Any = get(t.model, path)
    if type(attn) not in ATTENTIONS or attn.qkv is None:
        raise UnsupportedArchitecture(
            f"describe: {path} must be a timm Attention with fused qkv, got {type(attn).__name__}"
        )
    queries, values = attn.num_heads * attn.head_dim, attn.proj.in_features
    heads = t.axis(f"{path}.heads", attn.num_heads, "head")
    # the weight of q_norm and k_norm is shared by the heads, so their dims go together
    shared = has_norm(attn.q_norm)
    dims = attn.head_dim if shared else queries
    qk = t.axis(f"{path}.qk_dims", dims, "qk_dim", None if shared else heads)
    v = t.axis(f"{path}.v_dims", values, "v_dim", heads)
    inner_norm = has_norm(attn.norm)
    t.box(qk, unpaddable=(qk,) * shared)
    t.box(v, unpaddable=(v,) * inner_norm)
    t.linear(f"{path}.qkv", heads * qk + heads * qk + heads * v, embed, tokens)
    t.work(path, tokens * tokens, heads * qk)
    t.work(path, tokens * tokens, heads * v)
    t.norm(f"{path}.q_norm", qk)
    t.norm(f"{path}.k_norm", qk)
    t.norm(f"{path}.norm", heads * v)
    t.linear(f"{path}.gate", heads * v, embed, tokens)
    t.linear(f"{path}.proj", embed, heads * v, tokens)
    t.attr(path, num_heads=heads, num_kv_heads=heads, head_dim=qk)
    t.attr(path, attn_dim=heads * v, kv_dim=heads * v)
    normed = ("q_norm.weight", "q_norm.bias")
    t.attention(
        path,
        qk,
        normed if shared else ("qkv.weight", "qkv.bias"),
        key_bias=None if shared else ("qkv.bias", 1),
        value_bias=None if inner_norm or t.has(f"{path}.gate.weight") else ("qkv.bias", 2),
    )
    if shared:
        t.tap(qk, f"{path}.q_norm", qk, "output")
    else:
        t.tap(qk, f"{path}.qkv", heads * qk, "output", (0, queries))
    t.tap(heads, f"{path}.proj", heads * v)
    t.tap(v, f"{path}.proj", heads * v)
    return heads * v, f"{path}.proj"


def mlp(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Mlp, GluMlp (gate and value packed in halves of fc1), SwiGLU (two matrices)."""
    module: Any = get(t.model, path)
    if type(module) not in (Mlp, GluMlp, SwiGLU):
        raise UnsupportedArchitecture(
            f"describe: {path} must be Mlp, GluMlp or SwiGLU, got {type(module).__name__}"
        )
    neurons = t.axis(f"{path}.neurons", module.fc2.in_features, "neuron")
    hidden = neurons + neurons if isinstance(module, GluMlp) else neurons
    for name in ("fc1_g", "fc1_x") if isinstance(module, SwiGLU) else ("fc1",):
        t.linear(f"{path}.{name}", hidden, embed, tokens)
    t.norm(f"{path}.norm", neurons)
    t.linear(f"{path}.fc2", embed, neurons, tokens)
    t.tap(neurons, f"{path}.fc2", neurons)
    return neurons, f"{path}.fc2"


def has_norm(module: Any) -> bool:
    """Whether a place that may hold a norm or an Identity holds a norm."""
    return getattr(module, "normalized_shape", None) is not None


def covering(t: Builder, model: Any) -> list[str]:
    """Tensors that together add to every token exactly once; empty where there are none."""
    if not isinstance(model.norm_pre, nn.Identity):
        return ["norm_pre.bias"] if t.has("norm_pre.bias") else []
    if t.has("pos_embed") and not model.no_embed_class:
        return ["pos_embed"]
    if t.has("pos_embed"):
        patches = "pos_embed"
    elif isinstance(model.patch_embed.norm, nn.Identity):
        patches = "patch_embed.proj.bias"
    else:
        patches = "patch_embed.norm.bias"
    prefix = [name for name in ("cls_token", "dist_token", "reg_token") if t.has(name)]
    return [*prefix, patches] if t.has(patches) else []


def image_size(model: Any) -> tuple[int, int]:
    """The input size the model was built for."""
    size = model.patch_embed.img_size
    if size is None:
        raise InvalidInput(
            "describe: input_size must be given for a model without a fixed image size, got None"
        )
    return tuple(size)


def patches_in(model: Any, height: int, width: int) -> int:
    """How many patches an image has; InvalidInput where there are none."""
    rows, columns = model.patch_embed.dynamic_feat_size((height, width))
    if rows * columns == 0:
        patch = " x ".join(map(str, model.patch_embed.patch_size))
        raise InvalidInput(
            f"describe: input_size must be at least one patch ({patch}), got {height} x {width}"
        )
    return rows * columns


# pruning


def fitting(model: nn.Module) -> None:
    """Put a SlimPackedAttention where timm's cannot have the dims that are left."""
    for path, module in [*model.named_modules()]:
        # of an emptied one nothing is left, 0 rows of 0
        if type(module) is Attention and module.qkv.out_features != 3 * module.proj.in_features:
            exchange(model, path, SlimPackedAttention)


# saving

# what may stand in the place of a stock module: activations, norms, what an absent part is
SWAPS = (
    "timm.layers.activations",
    "timm.layers.activations_me",
    "timm.layers.drop.DropPath",
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.mlp",
    "timm.layers.norm",
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer.ResPostBlock",
    "torch.nn.modules.activation",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.normalization",
)
# timm's names for models that have none of their own; every argument is given, so the size in the
# name is moot
_ENTRYPOINTS = {
    "VisionTransformer": "vit_base_patch16_224",
    "VisionTransformerDistilled": "deit_base_distilled_patch16_224",
}


# of timm's pretrained_cfg; not what timm says by name of weights that need not be these (their
# home, tag, license and paper)
_KEPT = ("architecture", "first_conv", "classifier", *PREPARED)
# drop path follows no rule of timm's after blocks went; it is off in a model opened by timm
_LEFT_OUT = ("weight_init", "drop_path_rate")


def construct(model: Any) -> ConstructorCall:
    """The arguments of timm's VisionTransformer that decide which modules there are."""
    cores = [core for block in model.blocks for core in block.children()]
    attns = [core for core in cores if type(core) in ATTENTIONS]
    mlps = [core for core in cores if type(core) in (Mlp, GluMlp, SwiGLU)]
    outputs = [a.proj for a in attns] + [m.fc2 for m in mlps]
    norms = [m for m in model.modules() if has_norm(m)]
    scales = [m.init_values for m in model.modules() if isinstance(m, LayerScale)]
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    embed, width = model.patch_embed, model.embed_dim
    heads = attns[0].num_heads if attns else 1
    hidden = hidden_width(mlps[0]) if mlps else width
    post_norm = any(map(_is_post_norm, model.blocks))
    args = {
        "img_size": list(embed.img_size or embed.patch_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(model.blocks),
        "num_heads": heads if heads and width % heads == 0 else 1,
        # int(embed_dim * mlp_ratio) is then exactly the hidden width
        "mlp_ratio": (hidden + 0.5) / width,
        "qkv_bias": any(a.qkv.bias is not None for a in attns),
        "qk_norm": any(has_norm(a.q_norm) for a in attns),
        "scale_attn_norm": any(has_norm(a.norm) for a in attns),
        "scale_mlp_norm": any(has_norm(m.norm) for m in mlps),
        "proj_bias": any(o.bias is not None for o in outputs),
        # a scale of 0 would be taken for none
        "init_values": (scales[0] or 1.0) if scales else None,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": has_norm(model.norm_pre),
        "final_norm": has_norm(model.norm) or has_norm(model.fc_norm),
        "fc_norm": has_norm(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "proj_drop_rate": attns[0].proj_drop.p if attns else mlps[0].drop1.p if mlps else 0.0,
        "attn_drop_rate": attns[0].attn_drop.p if attns else 0.0,
        "drop_path_rate": max(rates, default=0.0),
        "weight_init": "skip",
        "embed_norm_layer": named(embed.norm) if has_norm(embed.norm) else None,
        "norm_layer": named(norms[-1]) if norms else None,
        "act_layer": named(mlps[0].act) if mlps else None,
        "block_fn": {"class": qualified(ResPostBlock if post_norm else Block)},
        "mlp_layer": named(mlps[0]) if mlps else {"class": qualified(Mlp)},
    }
    return {"class": qualified(type(model)), "args": args}


def _is_post_norm(block: Any) -> bool:
    return isinstance(block, ResPostBlock) or getattr(block, "post_norm", False)


def hidden_width(mlp: Any) -> int:
    """What the constructor of an MLP is told: of a packed gate it has both halves."""
    return (mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1).out_features


def named(module: Any) -> dict[str, Any]:
    """A class as an argument, with what only its constructor can give a module."""
    kept = ("eps", "gate_last")
    options = {name: getattr(module, name) for name in kept if hasattr(module, name)}
    return {"class": qualified(type(module)), **options}


def images(model: Any) -> Shape:
    """Channels, and the size of the images the model was built for."""
    size = model.patch_embed.img_size or (None, None)
    return (model.patch_embed.proj.in_channels, size[0], size[1])


def halves(block: Any, core: str) -> tuple[str, ...]:
    """The parts around ``attn`` or ``mlp``, in the order of ``Block`` or ``ResPostBlock``."""
    number = 1 if core == "attn" else 2
    norm, rest = f"norm{number}", (f"ls{number}", f"drop_path{number}")
    chain = (core, norm) if isinstance(block, ResPostBlock) else (norm, core)
    return (*chain, *(name for name in rest if hasattr(block, name)))


def renumbered(model: Any, moved: Mapping[str, str]) -> None:
    """``feature_info`` has an entry for every block."""
    infos = [info for info in model.feature_info if info["module"] in moved]
    model.feature_info = [{**info, "module": moved[info["module"]]} for info in infos]


def configs(model: Any) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """A config that timm itself may build the model from, then one that it cannot."""
    entrypoint = _ENTRYPOINTS[type(model).__name__]
    return configs_of(model, construct(model), images(model), entrypoint, "vit_pruned")


def configs_of(
    model: Any, call: ConstructorCall, shape: Shape, entrypoint: str, pruned: str
) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """What ``configs`` of a family of timm gives.

    Args:
        model: to be saved.
        call: of its constructor.
        shape: of its images.
        entrypoint: timm's name for such a model, where it has none of its own.
        pruned: what one is called that timm cannot build.
    """
    args = {
        name: value
        for name, value in call["args"].items()
        if not (isinstance(value, dict) or name.endswith("_layer") or name in _LEFT_OUT)
    }
    architecture = stated_config(model).get("architecture") or entrypoint
    # an architecture may take fewer arguments than the class, and be of another class today
    with contextlib.suppress(AssertionError, RuntimeError, TypeError, ValueError):
        # create_model would fetch a name that is an address
        if not timm.is_model(architecture):
            raise ValueError(architecture)
        with torch.device("meta"):
            made = timm.create_model(architecture, **args)
        config = _config(model, shape, architecture, args)
        config["pretrained_cfg"]["architecture"] = architecture
        yield config, made
    yield _config(model, shape, pruned, {}), None


def _config(model: Any, shape: Shape, architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    known = stated_config(model)
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
            **({"input_size": list(shape)} if None not in shape else {}),
            **{name: known[name] for name in _KEPT if known.get(name) is not None},
        },
    }


FAMILY = Family(
    describe,
    construct,
    images,
    blocks=lambda _: ("blocks",),
    halves=halves,
    swaps=SWAPS,
    fitting=fitting,
    renumbered=renumbered,
    configs=configs,
)
