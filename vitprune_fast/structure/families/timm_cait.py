"""timm's Cait: CaiT XXS24 to M48.

Read it next to ``timm/models/cait.py``: every line states one fact of that file. The trunk is a
residual stream of the patches. The class token has a stream of its own, of the same channels, in
which blocks of class attention follow one another; they read the patches and leave them as they
are.

Heads are no units. Those of the trunk talk: ``proj_l`` and ``proj_w`` mix the maps of all of them,
before and behind the softmax, so that none can go without the others. Class blocks keep their heads
and both of their branches, as they read one stream and write to another, which a branch of the
table does not; their neurons are units like those of the trunk. timm's attention is as wide as the
stream, so where channels went a ``SlimTalkingAttention`` and a ``SlimClassAttention`` stand for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
from timm.models.cait import (
    ClassAttn,
    LayerScaleBlock,
    LayerScaleBlockClassAttn,
    TalkingHeadAttn,
)
from torch import nn

from ...errors import UnsupportedArchitecture
from ...modeling_pruned import HalfBlock, SlimClassAttention, SlimTalkingAttention
from ..axes import Axis, as_dim
from ..builder import Builder
from ..table import Structure
from . import ConstructorCall, Family, qualified
from .branches import Inner, Part, describe_block, exchange, require
from .timm_vit import (
    SWAPS,
    configs_of,
    hidden_width,
    image_size,
    images,
    mlp,
    named,
    patches_in,
    renumbered,
)

SLIM = {TalkingHeadAttn: SlimTalkingAttention, ClassAttn: SlimClassAttention}


def describe(model: Any, image: tuple[int, int] | None) -> Structure:
    """The table of a CaiT whose input is ``image`` (height, width); None is its own size."""
    if model.global_pool == "avg" or not model.blocks_token_only:
        raise UnsupportedArchitecture(
            "describe: a Cait must classify by what its class blocks write, got "
            f"global_pool={model.global_pool!r} and {len(model.blocks_token_only or ())} class "
            "blocks; build it with global_pool='token' and depth_token_only=2"
        )
    height, width = image or image_size(model)
    patches = patches_in(model, height, width)
    channels = model.patch_embed.proj.in_channels
    t = Builder(model, type(model).__name__, (channels, height, width))
    embed = t.axis("embed", model.embed_dim, "embed")
    for name in ("cls_token", "pos_embed"):
        t.tensor(name, 1, ..., embed)
    t.linear("patch_embed.proj", embed, channels, patches)
    t.stem(embed, "pos_embed")
    parts = (
        Part("attn", "attn_branch", "norm1", _talking_attention, "gamma_1", "drop_path"),
        Part("mlp", "mlp_branch", "norm2", mlp, "gamma_2", "drop_path"),
    )
    for i, _ in enumerate(model.blocks):
        require(t, f"blocks.{i}", LayerScaleBlock, HalfBlock)
        describe_block(t, f"blocks.{i}", parts, embed, patches)
        t.attr(f"feature_info.{i}", num_chs=embed)
    for i, _ in enumerate(model.blocks_token_only):
        _describe_class_block(t, f"blocks_token_only.{i}", embed, patches + 1)
    t.norm("norm", embed)
    t.reader(embed, "head", "norm")
    t.linear("head", model.num_classes, embed, 1 if model.global_pool else patches + 1)
    t.attr("", embed_dim=embed, num_features=embed, head_hidden_size=embed)
    t.branch_axes()
    return t.finish()


def _talking_attention(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Fused qkv; a map of every pair of heads before the softmax, and another one behind it."""
    attn = require(t, path, TalkingHeadAttn, SlimTalkingAttention)
    heads, inner = attn.num_heads, as_dim(attn.proj.in_features)
    t.linear(f"{path}.qkv", inner + inner + inner, embed, tokens)
    t.work(path, tokens * tokens, inner)
    t.linear(f"{path}.proj_l", heads, heads, tokens * tokens)
    t.linear(f"{path}.proj_w", heads, heads, tokens * tokens)
    t.work(path, tokens * tokens, inner)
    t.linear(f"{path}.proj", embed, inner, tokens)
    # the rows of a mixed map do not add up to one, so the bias of the values does not pass it
    t.attention(path, None, key_bias=("qkv.bias", 1))
    return inner, f"{path}.proj"


def _describe_class_block(t: Builder, path: str, embed: Axis, tokens: int) -> None:
    """Class attention and MLP of the class token, which alone is written."""
    require(t, path, LayerScaleBlockClassAttn)
    attn, core = f"{path}.attn", require(t, f"{path}.attn", ClassAttn, SlimClassAttention)
    inner = core.proj.in_features
    t.norm(f"{path}.norm1", embed)
    t.linear(f"{attn}.q", inner, embed, 1)
    t.linear(f"{attn}.k", inner, embed, tokens)
    t.linear(f"{attn}.v", inner, embed, tokens)
    t.work(attn, tokens, inner)
    t.work(attn, tokens, inner)
    t.linear(f"{attn}.proj", embed, inner, 1)
    t.reader(embed, attn, f"{path}.norm1")
    t.norm(f"{path}.norm2", embed)
    mlp(t, f"{path}.mlp", embed, 1)
    t.reader(embed, f"{path}.mlp", f"{path}.norm2")
    for gain in ("gamma_1", "gamma_2"):
        t.tensor(f"{path}.{gain}", embed)


# pruning


def fitting(model: nn.Module) -> None:
    """Put a stand-in where timm's attention, as wide as the stream, cannot have its heads."""
    for path, module in [*model.named_modules()]:
        if type(module) in SLIM:
            attn: Any = module
            if attn.proj.in_features != attn.proj.out_features:
                exchange(model, path, SLIM[type(module)])


# saving


def construct(model: Any) -> ConstructorCall:
    """The arguments of timm's Cait that decide which modules there are."""
    attns = [m for m in model.modules() if isinstance(m, (*SLIM, *SLIM.values()))]
    talking = [m for m in attns if hasattr(m, "proj_l")]
    trunk, token_only = (
        [m for m in blocks.modules() if type(m) in (Mlp, GluMlp, SwiGLU)]
        for blocks in (model.blocks, model.blocks_token_only)
    )
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    embed, width = model.patch_embed, model.embed_dim
    args = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(model.blocks),
        # of more heads than channels it could not make the temperature
        "num_heads": min(width, attns[0].num_heads if attns else 1),
        "mlp_ratio": _ratio(trunk, width),
        "qkv_bias": any(m.qkv.bias is not None for m in talking)
        or any(m.q.bias is not None for m in attns if m not in talking),
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": talking[0].proj_drop.p if talking else 0.0,
        "attn_drop_rate": talking[0].attn_drop.p if talking else 0.0,
        "drop_path_rate": max(rates, default=0.0),
        "norm_layer": named(model.norm),
        "act_layer": named((trunk + token_only)[0].act) if trunk or token_only else None,
        "mlp_block": named(trunk[0]) if trunk else {"class": qualified(Mlp)},
        "mlp_block_token_only": named(token_only[0]) if token_only else {"class": qualified(Mlp)},
        "depth_token_only": len(model.blocks_token_only),
        "mlp_ratio_token_only": _ratio(token_only, width),
    }
    return {"class": qualified(type(model)), "args": args}


def _ratio(mlps: list[Any], width: int) -> float:
    """That of which int(width * ratio) is exactly the hidden width."""
    return (hidden_width(mlps[0]) + 0.5) / width if mlps else 1.0


def halves(_: Any, core: str) -> tuple[str, ...]:
    """The parts around ``attn`` or ``mlp``, in the order of ``LayerScaleBlock``."""
    number = 1 if core == "attn" else 2
    return (f"norm{number}", core, f"gamma_{number}", "drop_path")


def configs(model: Any) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """A config that timm itself may build the model from, then one that it cannot."""
    return configs_of(model, construct(model), images(model), "cait_s24_224", "cait_pruned")


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
