"""timm's PyramidVisionTransformerV2: PVTv2 B0 to B5, and B2 with linear attention.

Read it next to ``timm/models/pvt_v2.py``: every line states one fact of that file. Each stage is a
residual stream of its own, which its patch embedding opens and its norm closes. Keys and values are
made of fewer tokens, and by a convolution whose width is no matter of the stream. timm's attention
has as many dims as its heads take from the stream, so where there are other numbers of them a
``SlimReductionAttention`` stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from timm.layers import DropPath
from timm.models.pvt_v2 import (
    Attention,
    Block,
    MlpWithDepthwiseConv,
    OverlapPatchEmbed,
    PyramidVisionTransformerStage,
)
from torch import nn

from ...errors import InvalidInput, UnsupportedArchitecture
from ...modeling_pruned import HalfBlock, SlimReductionAttention
from ...stated import image_shape
from ..axes import Axis
from ..builder import Builder
from ..paths import get
from ..table import Structure
from . import ConstructorCall, Family, qualified
from .branches import Inner, Part, attention_axes, describe_block, exchange, require
from .timm_vit import configs_of, has_norm, named

ATTENTIONS = (Attention, SlimReductionAttention)
# rows and columns of tokens
Grid = tuple[int, int]


def describe(model: Any, image: Grid | None) -> Structure:
    """The table of a PVTv2 whose input is ``image`` (height, width); None is what it states."""
    grid = image or image_size(model)
    channels = model.patch_embed.proj.in_channels
    t = Builder(model, type(model).__name__, (channels, *grid))
    read: Axis | int = channels
    for number, stage in enumerate(model.stages):
        path = f"stages.{number}"
        embedding = f"{path}.downsample" if number else "patch_embed"
        require(t, path, PyramidVisionTransformerStage)
        require(t, embedding, OverlapPatchEmbed)
        if not has_norm(stage.norm):
            raise UnsupportedArchitecture(
                f"describe: {path}.norm must be a norm, got {type(stage.norm).__name__}"
            )
        conv = get(model, f"{embedding}.proj")
        grid = _behind(conv, grid)
        embed = t.axis(f"{path}.embed", conv.out_channels, "embed")
        t.linear(f"{embedding}.proj", embed, read, math.prod(grid))
        t.norm(f"{embedding}.norm", embed)
        t.stem(embed, f"{embedding}.norm.bias")
        t.writer_norm(embed, f"{embedding}.norm")
        _describe_blocks(t, f"{path}.blocks", embed, grid)
        t.norm(f"{path}.norm", embed)
        is_last = number == len(model.stages) - 1
        t.reader(
            embed, "head" if is_last else f"stages.{number + 1}.downsample.proj", f"{path}.norm"
        )
        t.attr(f"feature_info.{number}", num_chs=embed)
        read = embed
    t.linear("head", model.num_classes, read, 1)
    t.attr("", num_features=read, head_hidden_size=read)
    t.branch_axes()
    return t.finish()


def image_size(model: Any) -> Grid:
    """The size of images that a model states, which its modules do not know."""
    _, height, width = image_shape(model)
    if height is None or width is None:
        raise InvalidInput(
            "describe: input_size must be given for a model that states none, got None; set "
            "model.pretrained_cfg = {'input_size': (3, 224, 224)} where it cannot be given"
        )
    return height, width


def _behind(conv: Any, grid: Grid) -> Grid:
    """What a convolution makes of a grid."""
    sides = zip(grid, conv.kernel_size, conv.stride, conv.padding, strict=True)
    rows, columns = ((side + 2 * pad - size) // step + 1 for side, size, step, pad in sides)
    return rows, columns


def _describe_blocks(t: Builder, path: str, embed: Axis, grid: Grid) -> None:
    parts = (
        Part("attn", "attn_branch", "norm1", partial(_attention, grid=grid), drop="drop_path1"),
        Part("mlp", "mlp_branch", "norm2", _mlp, drop="drop_path2"),
    )
    for name, _ in get(t.model, path).named_children():
        require(t, f"{path}.{name}", Block, HalfBlock)
        describe_block(t, f"{path}.{name}", parts, embed, math.prod(grid))


def _attention(t: Builder, path: str, embed: Axis, tokens: int, *, grid: Grid) -> Inner:
    """Queries of all tokens; keys and values, side by side, of the reduced ones."""
    attn = require(t, path, *ATTENTIONS)
    heads, qk, v = attention_axes(
        t, path, attn.num_heads, attn.q.out_features, attn.proj.in_features
    )
    read, seen = embed, tokens
    if attn.sr is not None:
        pooled = grid if attn.pool is None else (attn.pool.output_size,) * 2
        seen = math.prod(_behind(attn.sr, pooled))
        if not seen:
            raise InvalidInput(
                f"describe: input_size must leave {path} at least "
                f"{' x '.join(map(str, attn.sr.kernel_size))} tokens to reduce, got "
                f"{' x '.join(map(str, t.structure.input_size[1:]))} pixels, which leave "
                f"{' x '.join(map(str, grid))}"
            )
        read = t.axis(f"{path}.reduced", attn.sr.out_channels, "embed")
        t.linear(f"{path}.sr", read, embed, seen)
        t.norm(f"{path}.norm", read)
        t.reader(read, f"{path}.kv", f"{path}.norm")
    t.linear(f"{path}.q", heads * qk, embed, tokens)
    t.linear(f"{path}.kv", heads * qk + heads * v, read, seen)
    t.work(path, tokens * seen, heads * qk)
    t.work(path, tokens * seen, heads * v)
    t.linear(f"{path}.proj", embed, heads * v, tokens)
    t.attr(path, dim=embed, num_heads=heads)
    t.attention(
        path,
        None,
        ("q.weight", "q.bias"),
        key_bias=("kv.bias", 0),
        value_bias=("kv.bias", 1),
    )
    t.tap(qk, f"{path}.q", heads * qk, "output")
    t.tap(heads, f"{path}.proj", heads * v)
    t.tap(v, f"{path}.proj", heads * v)
    return heads * v, f"{path}.proj"


def _mlp(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """A neuron has a filter of its own over the grid between its row and its column."""
    mlp = require(t, path, MlpWithDepthwiseConv)
    neurons = t.axis(f"{path}.neurons", mlp.fc2.in_features, "neuron")
    t.linear(f"{path}.fc1", neurons, embed, tokens)
    t.linear(f"{path}.dwconv", neurons, 1, tokens)
    t.linear(f"{path}.fc2", embed, neurons, tokens)
    t.tap(neurons, f"{path}.fc2", neurons)
    return neurons, f"{path}.fc2"


# pruning


def fitting(model: nn.Module) -> None:
    """Put a SlimReductionAttention where timm's cannot have the sizes that are left."""
    for path, module in [*model.named_modules()]:
        if type(module) is Attention and module.proj.weight.numel() and not _fits(module):
            exchange(model, path, SlimReductionAttention)


def _fits(attention: Any) -> bool:
    """Whether all widths are that of the stream, and its heads are as wide as they ever were.

    timm's fused path takes the temperature from their width, and no plan changes ``head_dim``.
    """
    q, kv, proj = attention.q, attention.kv, attention.proj
    width = attention.num_heads * attention.head_dim
    return {q.out_features, kv.in_features, proj.in_features, proj.out_features} == {width}


def renumbered(model: Any, _: Mapping[str, str]) -> None:
    """A model tells the depths of its stages; ``feature_info`` has an entry for every stage."""
    model.depths = tuple(len(stage.blocks) for stage in model.stages)


# saving

SWAPS = (
    "timm.layers.activations",
    "timm.layers.activations_me",
    "timm.layers.drop.DropPath",
    "timm.layers.norm",
    "torch.nn.modules.activation",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.normalization",
)


def construct(model: Any) -> ConstructorCall:
    """The arguments of timm's PyramidVisionTransformerV2 that decide which modules there are."""
    attns = [_first(stage, *ATTENTIONS) for stage in model.stages]
    mlps = [_first(stage, MlpWithDepthwiseConv) for stage in model.stages]
    # a stage that has none takes any size
    heads = [1 if attn is None else attn.num_heads for attn in attns]
    reductions = [1 if attn is None or attn.sr is None else attn.sr.stride[0] for attn in attns]
    # of one channel a convolution does not tell whether each has a filter of its own
    hidden = [2 if mlp is None else max(mlp.fc1.out_features, 2) for mlp in mlps]
    widths = [stage.norm.normalized_shape[0] for stage in model.stages]
    attns, mlps = ([core for core in some if core is not None] for some in (attns, mlps))
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    args = {
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "depths": [len(stage.blocks) for stage in model.stages],
        "embed_dims": widths,
        "num_heads": [n if n and w % n == 0 else 1 for n, w in zip(heads, widths, strict=True)],
        "sr_ratios": reductions,
        # int(embed_dim * mlp_ratio) is then exactly the hidden width
        "mlp_ratios": [(h + 0.5) / w for h, w in zip(hidden, widths, strict=True)],
        "qkv_bias": any(attn.q.bias is not None for attn in attns),
        "linear": any(attn.pool is not None for attn in attns)
        or any(isinstance(mlp.relu, nn.ReLU) for mlp in mlps),
        "drop_rate": model.head_drop.p,
        "proj_drop_rate": next((mlp.drop.p for mlp in mlps), 0.0),
        "attn_drop_rate": next((attn.attn_drop.p for attn in attns), 0.0),
        "drop_path_rate": max(rates, default=0.0),
        "norm_layer": named(model.stages[-1].norm),
    }
    return {"class": qualified(type(model)), "args": args}


def _first(stage: Any, *classes: type) -> Any:
    """The first core of a stage that is of one of the classes; None where there is none left."""
    cores = (core for block in stage.blocks for core in block.children())
    return next((core for core in cores if type(core) in classes), None)


def halves(block: Any, core: str) -> tuple[str, ...]:
    """The parts around ``attn`` or ``mlp``, in the order of ``Block``."""
    number = 1 if core == "attn" else 2
    return (f"norm{number}", core, f"drop_path{number}")


def configs(model: Any) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """A config that timm itself may build the model from, then one that it cannot."""
    return configs_of(model, construct(model), image_shape(model), "pvt_v2_b0", "pvt_v2_pruned")


FAMILY = Family(
    describe,
    construct,
    images=image_shape,
    blocks=lambda model: tuple(f"stages.{n}.blocks" for n in range(len(model.stages))),
    halves=halves,
    swaps=SWAPS,
    fitting=fitting,
    renumbered=renumbered,
    configs=configs,
)
