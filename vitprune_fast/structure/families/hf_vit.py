"""transformers' ViT with a classifier and without, and what its relatives have in common with it.

Read it next to ``transformers/models/vit/modeling_vit.py``: every line states a fact of that file.
Versions before 5.9 (ViT, DeiT) and 5.18 (DINOv2) gave parts other names; which ones hold is read
from the model. A relative is a file with the :class:`Names` in which it differs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import InvalidInput, UnsupportedArchitecture
from ...modeling_pruned import HalfBlock, SlimSeparateAttention, config_settings
from ..axes import Axis
from ..builder import Builder
from ..paths import get
from ..table import Structure
from . import ConstructorCall, Family, qualified
from .branches import Inner, Part, all_alike, attention_axes, exchange
from .branches import describe_block as describe_parts


@dataclass(frozen=True)
class Names:
    """Where a model keeps its parts; paths of norms, gains and what drops are below a block.

    Args:
        norms: before the attention and before the MLP.
        gains: weights of the LayerScales; empty where there are none.
        drop: what drops from both branches.
        tokens: of the embeddings, besides ``cls_token`` and ``position_embeddings``.
        covering: those that together add to every token exactly once.
        classifiers: the Linears that put out logits.
        reads: how many times the width of the stream a classifier reads.
        resizes: whether position embeddings are made to fit images of another size.
    """

    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    gains: tuple[str, str] = ("", "")
    drop: str = "dropout"
    tokens: tuple[str, ...] = ()
    covering: tuple[str, ...] = ("position_embeddings",)
    classifiers: tuple[str, ...] = ("classifier",)
    reads: int = 1
    resizes: bool = False


# names of the same parts in different versions, the newest first: a model has one row of each
_BLOCKS = (("layers",), ("encoder.layer",))
# of q, k, v and out, and of what says how many heads there are, below ``attention``
_ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads"),
    (
        "attention.query",
        "attention.key",
        "attention.value",
        "output.dense",
        "attention.num_attention_heads",
    ),
)
# the Linears of an MLP below a block; the gate and value of a SwiGLU may be packed into one
_MLPS = (
    ("mlp.fc1", "mlp.fc2"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp.weights_in", "mlp.weights_out"),
    ("intermediate.dense", "output.dense"),
)


def describe(names: Names, model: Any, image: tuple[int, int] | None) -> Structure:
    """The table of a model for images of (height, width); None is the size of its config."""
    channels, *size = images(model)
    height, width = image or size
    if [height, width] != size and not names.resizes:
        raise InvalidInput(
            f"describe: input_size must be that of the config, {size[0]} x {size[1]}, "
            f"got {height} x {width}"
        )
    base = _base(model)
    embeddings = f"{base}embeddings"
    patch = get(model, f"{embeddings}.patch_embeddings.projection").stride
    patches = (height // patch[0]) * (width // patch[1])
    if not patches:
        raise InvalidInput(
            f"describe: input_size must be at least one patch ({patch[0]} x {patch[1]}), "
            f"got {height} x {width}"
        )
    # position embeddings are of patches and of the tokens that have one
    own = get(model, f"{embeddings}.position_embeddings").shape[1]
    registers = get(model, f"{embeddings}.register_tokens")
    tokens = own - get(model, f"{embeddings}.patch_embeddings").num_patches + patches
    tokens += 0 if registers is None else registers.shape[1]

    t = Builder(model, type(model).__name__, (channels, height, width))
    projection = f"{embeddings}.patch_embeddings.projection"
    embed = t.axis("embed", get(model, projection).out_channels, "embed")
    for name in ("cls_token", "position_embeddings", *names.tokens):
        t.tensor(f"{embeddings}.{name}", 1, ..., embed)
    # (1, N, C), or (1, C) in DINOv2
    masked = get(model, f"{embeddings}.mask_token")
    if masked is not None:
        t.tensor(f"{embeddings}.mask_token", *[...] * (masked.ndim - 1), embed)
    t.linear(projection, embed, channels, patches)
    covering = (f"{embeddings}.{name}" for name in names.covering)
    t.stem(embed, *filter(t.has, covering))
    for path in _blocks(model):
        _describe_block(t, path, names, embed, tokens)
    t.norm(f"{base}layernorm", embed)
    # a backbone has no classifier, but may have a pooler, whose outputs stay
    for name in (*names.classifiers, "pooler.dense"):
        read = embed + embed if names.reads == 2 else embed
        t.linear(name, getattr(get(model, name), "out_features", 0), read, 1)
    t.reader(embed, base.rstrip("."), f"{base}layernorm")
    t.branch_axes()
    return t.finish()


def _blocks(model: Any) -> list[str]:
    """Paths of the blocks, in order."""
    (container,) = blocks(model)
    return [f"{container}.{i}" for i in range(len(get(model, container)))]


def blocks(model: Any) -> tuple[str, ...]:
    """Path of what holds the blocks."""
    base = _base(model)
    return (f"{base}{_names(model, base.rstrip('.'), _BLOCKS)[0]}",)


def _base(model: Any) -> str:
    """What stands before the names of a backbone's parts: its own, or nothing in a bare one."""
    prefix = model.base_model_prefix
    return f"{prefix}." if hasattr(model, prefix) else ""


def _names(model: nn.Module, path: str, rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The row of names that the module at ``path`` has."""
    for row in rows:
        if all(get(model, f"{path}.{name}".lstrip(".")) is not None for name in row):
            return row
    wanted = "; or ".join(", ".join(row) for row in rows)
    raise UnsupportedArchitecture(
        f"describe: {path} must have {wanted}, got {type(get(model, path)).__name__} with other "
        "names"
    )


def _describe_block(t: Builder, path: str, names: Names, embed: Axis, tokens: int) -> None:
    """Attention and MLP, each behind a norm and before a LayerScale, where there is one."""
    block = get(t.model, path)
    homes = (type(t.model).__module__, HalfBlock.__module__, "torch.nn.")
    for module in (block, *block.children()):
        if not type(module).__module__.startswith(homes):
            raise UnsupportedArchitecture(
                f"describe: {path} must be made of parts of {homes[0]}, got {type(module).__name__}"
            )
    # before 5.9 the module around the last Linear adds the stream to what that puts out
    mlp = "mlp" if get(block, "intermediate") is None else "output.dense"
    cores = (("attention", "attn_branch", _attention), (mlp, "mlp_branch", _mlp))
    parts = [
        Part(core, kind, norm, layout, gain)
        for (core, kind, layout), norm, gain in zip(cores, names.norms, names.gains, strict=True)
    ]
    describe_parts(t, path, parts, embed, tokens)


def _attention(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Separate projections, and a temperature that is stored; the stock class has one head_dim."""
    names = _names(t.model, path, _ATTENTIONS)
    q, k, v, out, count = (f"{path}.{name}" for name in names)
    sizes = get(t.model, q).out_features, get(t.model, out).in_features
    if sizes[0] != sizes[1] and type(get(t.model, path)) is not SlimSeparateAttention:
        raise UnsupportedArchitecture(
            f"describe: {path} must have as many rows of queries as of values, got {sizes}"
        )
    heads, qk_dims, v_dims = attention_axes(t, path, get(t.model, count), *sizes)
    for projection, dims in ((q, qk_dims), (k, qk_dims), (v, v_dims)):
        t.linear(projection, heads * dims, embed, tokens)
    t.linear(out, embed, heads * v_dims, tokens)
    t.work(path, tokens * tokens, heads * qk_dims)
    t.work(path, tokens * tokens, heads * v_dims)
    t.attr(path, num_attention_heads=heads, head_dim=qk_dims)
    t.attention(
        path, None, (), key_bias=(f"{names[1]}.bias", 0), value_bias=(f"{names[2]}.bias", 0)
    )
    t.tap(heads, out, heads * v_dims)
    t.tap(v_dims, out, heads * v_dims)
    t.tap(qk_dims, q, heads * qk_dims, "output")
    return heads * v_dims, out


def _mlp(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Two Linears, or those of a SwiGLU."""
    block = path.removesuffix(".mlp").removesuffix(".output.dense")
    *first, last = (f"{block}.{name}" for name in _names(t.model, block, _MLPS))
    size = get(t.model, last).in_features
    neurons = t.axis(f"{first[0].rpartition('.')[0]}.neurons", size, "neuron")
    for name in first:
        packed = get(t.model, name).out_features == 2 * size
        t.linear(name, neurons + neurons if packed else neurons, embed, tokens)
    t.linear(last, embed, neurons, tokens)
    t.tap(neurons, last, neurons)
    return neurons, last


# saving


def construct(model: Any) -> ConstructorCall:
    """The config, as the constructor takes it."""
    settings = config_settings(type(model.config))
    said = {name: value for name, value in model.config.to_diff_dict().items() if name in settings}
    config = {"class": qualified(type(model.config)), **said}
    if model.config._attn_implementation == "eager":
        config["attn_implementation"] = "eager"
    bare = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    return {"class": qualified(type(model)), "args": {"config": config, **bare}}


def images(model: Any) -> tuple[int, int, int]:
    """Channels and image size of the config."""
    size = model.config.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    return (model.config.num_channels, height, width)


def halves(names: Names, block: Any, core: str) -> tuple[str, ...]:
    """The parts around the attention or the MLP, in the order of ``ViTLayer``."""
    number = 0 if core == "attention" else 1
    gain = names.gains[number].rpartition(".")[0]
    return (names.norms[number], core, *([gain] if gain else []), names.drop)


def fitting(model: Any) -> None:
    """Put a SlimSeparateAttention where the stock one cannot have the dims that are left."""
    restate(model)
    for path in _blocks(model):
        core = get(model, f"{path}.attention")
        if hasattr(core, "head_dim") and core.q_proj.out_features != core.o_proj.in_features:
            exchange(model, f"{path}.attention", SlimSeparateAttention)


def restate(model: Any) -> None:
    """Have the config say what holds for all blocks, as far as it has a word for it."""
    config, paths = model.config, _blocks(model)
    for path in paths:
        if get(model, f"{path}.attention.attention") is not None:
            raise UnsupportedArchitecture(
                f"prune: transformers must be 5.18 or later for a {type(model).__name__} (5.9 for "
                f"ViT and DeiT), got one whose {path} adds the stream inside its parts"
            )
    width = get(model, f"{_base(model)}layernorm").normalized_shape[0]
    attentions = [get(model, f"{path}.attention") for path in paths]
    attentions = [core for core in attentions if hasattr(core, "head_dim")]
    outputs = [get(model, f"{path}.{_MLPS[0][-1]}") for path in paths]
    hidden = all_alike(out.in_features for out in outputs if out is not None)
    said: dict[str, int | None] = {
        "hidden_size": width,
        "num_hidden_layers": len(paths),
        "num_attention_heads": all_alike(core.num_attention_heads for core in attentions),
        "head_dim": all_alike(
            layer.out_features // max(core.num_attention_heads, 1)
            for core in attentions
            for layer in (core.q_proj, core.v_proj)
        ),
        "intermediate_size": hidden,
        "mlp_ratio": None if hidden is None or hidden % width else hidden // width,
    }
    if said["head_dim"] == width // (said["num_attention_heads"] or 1):
        # what a config that says nothing of it stands for
        vars(config).pop("head_dim", None)
        del said["head_dim"]
    if len(getattr(config, "stage_names", ())) not in (0, len(paths) + 1):
        # a backbone would hand out what its last block makes
        config.stage_names = ["stem", *(f"stage{i}" for i in range(1, len(paths) + 1))]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    for name, value in said.items():
        if value is not None and (name == "head_dim" or hasattr(config, name)):
            setattr(config, name, value)


def configs(model: Any) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """The config of transformers, with which ``from_pretrained`` opens the folder."""
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    yield {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}, made
    yield {}, None


def family_of(names: Names, *config_classes: str) -> Family:
    """A family of models with these names, and the configs that may be given to them."""
    return Family(
        partial(describe, names),
        construct,
        images,
        blocks=blocks,
        halves=partial(halves, names),
        swaps=config_classes,
        pairs=("attention",),
        fitting=fitting,
        renumbered=lambda model, moved: restate(model),
        configs=configs,
    )


FAMILY = family_of(Names(), "transformers.models.vit.configuration_vit.ViTConfig")
