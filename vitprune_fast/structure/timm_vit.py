"""timm's VisionTransformer and VisionTransformerDistilled: ViT, DeiT, AugReg, CLIP, DINOv2.

Read it beside ``timm/models/vision_transformer.py``: every line states one fact of that file.
"""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import nn

from ..errors import InvalidInput, UnsupportedArchitecture
from ..modeling_pruned import AttentionBlock, Constant, MlpBlock
from .axes import Axis, Dim
from .builder import Builder
from .table import Structure

MODELS = (VisionTransformer, VisionTransformerDistilled)
BLOCKS = (Block, ResPostBlock, AttentionBlock, MlpBlock)


def describe(model: Any, image: tuple[int, int] | None) -> Structure:
    """The table of a ViT whose input is ``image`` (height, width); None is its own size."""
    height, width = image or image_size(model)
    rows, columns = model.patch_embed.dynamic_feat_size((height, width))
    num_patches = rows * columns
    if num_patches == 0:
        patch = " x ".join(map(str, model.patch_embed.patch_size))
        raise InvalidInput(
            f"describe: input_size must be at least one patch ({patch}), got {height} x {width}"
        )
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
    post_norm = isinstance(block, ResPostBlock) or getattr(block, "post_norm", False)
    branches = []
    parts = (("attn", "attn_branch", "proj", attention), ("mlp", "mlp_branch", "fc2", mlp))
    for k, (name, kind, out, layout) in enumerate(parts, 1):
        core, core_path = getattr(block, name, None), f"{path}.{name}"
        if core is None:
            continue
        t.norm(f"{path}.norm{k}", embed)
        constant = isinstance(core, Constant)
        t.tensor(f"{core_path}.bias", embed)
        t.branch(
            core_path,
            embed,
            kind,
            None if constant else layout(t, core_path, core, embed, tokens),
            out=core_path if constant else f"{core_path}.{out}",
            norm=f"{path}.norm{k}",
            gain=f"{path}.ls{k}.gamma",
            drop=f"{path}.drop_path{k}",
            post_norm=post_norm,
        )
        if constant:
            continue
        if post_norm:
            t.reader(embed, core_path)
            t.writer_norm(embed, f"{path}.norm{k}")
        else:
            t.reader(embed, core_path, f"{path}.norm{k}")
        branches.append(core_path)
    if branches and not any(isinstance(m, Constant) for m in block.children()):
        t.structure.blocks[path] = tuple(branches)


def attention(t: Builder, path: str, attn: Any, embed: Axis, tokens: int) -> Dim:
    """Fused qkv, one head_dim for q, k and v; returns what reaches ``proj``."""
    if type(attn) is not Attention or attn.qkv is None:
        raise UnsupportedArchitecture(
            f"describe: {path} must be a timm Attention with fused qkv, got {type(attn).__name__}"
        )
    heads = t.axis(f"{path}.heads", attn.num_heads, "head")
    # the weight of q_norm and k_norm is shared by the heads, so their dims go together
    shared = has_norm(attn.q_norm)
    dims = attn.head_dim if shared else attn.num_heads * attn.head_dim
    qk = t.axis(f"{path}.qk_dims", dims, "qk_dim", None if shared else heads)
    v = t.axis(f"{path}.v_dims", attn.num_heads * attn.head_dim, "v_dim", heads)
    inner_norm = has_norm(attn.norm)
    t.box(qk, v, unpaddable=(qk,) * shared + (v,) * inner_norm)
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
        t.tap(qk, f"{path}.qkv", heads * qk, "output", (0, dims))
    t.tap(heads, f"{path}.proj", heads * v)
    t.tap(v, f"{path}.proj", heads * v)
    return heads * v


def mlp(t: Builder, path: str, module: Any, embed: Axis, tokens: int) -> Axis:
    """Mlp, GluMlp (gate and value packed in halves of fc1), SwiGLU (two matrices)."""
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
    return neurons


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
