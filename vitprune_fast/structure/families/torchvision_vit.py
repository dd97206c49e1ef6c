"""torchvision's VisionTransformer: ``vit_b_16`` and its kin, whose attention is torch's own.

Read it next to ``torchvision/models/vision_transformer.py``: every line states one fact of that
file. ``nn.MultiheadAttention`` has as many dims as its heads take from the stream, so where they
are other ones a ``SlimAttention`` stands for it; and it multiplies with ``out_proj`` inside one
function, so it is opened for whoever puts hooks on what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock

from ...errors import InvalidInput, UnsupportedArchitecture
from ...modeling_pruned import HalfBlock, SlimAttention, attended, check_plain_call, state
from ...modules.swap import exchange_forward
from ..axes import Axis
from ..builder import Builder
from ..paths import get
from ..table import Structure
from . import ConstructorCall, Family, Shape, qualified
from .branches import Inner, Part, attention_axes, exchange
from .branches import describe_block as describe_parts

# the packed projection of q, k and v as a module: it is a bare weight otherwise
PROJECTION = "in_proj"


def describe(model: Any, image: tuple[int, int] | None) -> Structure:
    """The table of a ViT; it takes images of one size."""
    size = (model.image_size, model.image_size)
    if image not in (None, size):
        raise InvalidInput(
            f"describe: input_size must be that of the model, {size[0]} x {size[1]}, "
            f"got {image[0]} x {image[1]}"
        )
    t = Builder(model, "torchvision VisionTransformer", (_convs(model)[0][1].in_channels, *size))
    embed = t.axis("embed", model.hidden_dim, "embed")
    t.tensor("class_token", 1, ..., embed)
    t.tensor("encoder.pos_embedding", 1, ..., embed)
    _describe_patches(t, embed)
    t.stem(embed, "encoder.pos_embedding")
    parts = (
        Part("self_attention", "attn_branch", "ln_1", _attention),
        Part("mlp", "mlp_branch", "ln_2", _mlp),
    )
    for name, block in model.encoder.layers.named_children():
        path = f"encoder.layers.{name}"
        _check_block(path, block)
        describe_parts(t, path, parts, embed, model.seq_length)
        if heads := t.structure.axes.get(f"{path}.self_attention.heads"):
            t.attr(path, num_heads=heads)
    t.norm("encoder.ln", embed)
    _describe_heads(t, embed)
    t.reader(embed, "heads", "encoder.ln")
    t.attr("", hidden_dim=embed)
    t.branch_axes()
    return t.finish()


def _convs(model: Any) -> list[tuple[str, nn.Conv2d]]:
    """The convolutions that make patches; the last writes the stream."""
    modules = model.conv_proj.named_modules(prefix="conv_proj")
    return [(path, module) for path, module in modules if isinstance(module, nn.Conv2d)]


def _describe_patches(t: Builder, embed: Axis) -> None:
    """One convolution, or a stem of several, of which the stream sees the last."""
    model: Any = t.model
    *inner, (last, conv) = _convs(model)
    side = model.image_size
    for path, module in inner:
        assert not isinstance(module.padding, str)
        side = (side + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
        t.linear(path, module.out_channels, module.in_channels, side * side)
    t.linear(last, embed, conv.in_channels, model.seq_length - 1)
    for name in state(model.conv_proj) if inner else ():
        if not t.has(f"conv_proj.{name}"):
            t.tensor(f"conv_proj.{name}")


def _describe_heads(t: Builder, embed: Axis) -> None:
    """The classifier: a Linear in a Sequential, behind another one or not, or a Linear alone."""
    heads = get(t.model, "heads")
    if isinstance(heads, nn.Linear):
        t.linear("heads", heads.out_features, embed, 1)
        return
    if isinstance(heads, nn.Identity):
        # a backbone
        return
    names = {name: part for name, part in heads.named_children() if [*part.parameters()]}
    if not isinstance(heads, nn.Sequential) or not names.keys() <= {"pre_logits", "head"}:
        raise UnsupportedArchitecture(
            "describe: heads must be a Linear, an Identity, or a Sequential with a Linear named "
            f"'head', got {type(heads).__name__} of {', '.join(names) or 'no layers'}"
        )
    read: Axis | int = embed
    for name in ("pre_logits", "head"):
        if isinstance(linear := names.get(name), nn.Linear):
            t.linear(f"heads.{name}", linear.out_features, read, 1)
            read = linear.out_features


def _check_block(path: str, block: Any) -> None:
    if type(block) not in (EncoderBlock, HalfBlock):
        raise UnsupportedArchitecture(
            f"describe: {path} must be an EncoderBlock, got {type(block).__name__}"
        )


def _attention(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Packed q, k and v; those of queries and keys may be fewer than those of values."""
    module: Any = get(t.model, path)
    plain = type(module) is SlimAttention or (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.batch_first
        and module.bias_k is None
        and not module.add_zero_attn
    )
    if not plain:
        raise UnsupportedArchitecture(
            f"describe: {path} must be nn.MultiheadAttention with batch_first and packed weights, "
            f"without bias_k and add_zero_attn, got {type(module).__name__}"
        )
    rows: Tensor = get(t.model, f"{path}.in_proj_weight")
    inner, count = module.out_proj.in_features, module.num_heads
    queries = (len(rows) - inner) // 2
    heads, qk, v = attention_axes(t, path, count, queries, inner)
    packed = heads * qk + heads * qk + heads * v
    t.tensor(f"{path}.in_proj_weight", packed, embed)
    t.tensor(f"{path}.in_proj_bias", packed)
    t.linear(f"{path}.out_proj", embed, heads * v, tokens)
    t.work(path, tokens, packed, embed)
    t.work(path, tokens * tokens, heads * qk)
    t.work(path, tokens * tokens, heads * v)
    t.attr(path, num_heads=heads)
    t.attention(
        path,
        None,
        ("in_proj_weight", "in_proj_bias"),
        key_bias=("in_proj_bias", 1),
        value_bias=("in_proj_bias", 2),
    )
    t.tap(heads, f"{path}.out_proj", heads * v)
    t.tap(v, f"{path}.out_proj", heads * v)
    t.tap(qk, f"{path}.{PROJECTION}", heads * qk, "output", (0, queries))
    return heads * v, f"{path}.out_proj"


def _mlp(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Linear, GELU, dropout, Linear, dropout in one Sequential."""
    if type(get(t.model, path)) is not MLPBlock:
        raise UnsupportedArchitecture(
            f"describe: {path} must be an MLPBlock, got {type(get(t.model, path)).__name__}"
        )
    neurons = t.axis(f"{path}.neurons", get(t.model, f"{path}.3").in_features, "neuron")
    t.linear(f"{path}.0", neurons, embed, tokens)
    t.linear(f"{path}.3", embed, neurons, tokens)
    t.tap(neurons, f"{path}.3", neurons)
    return neurons, f"{path}.3"


# pruning


def fitting(model: nn.Module) -> None:
    """Put a SlimAttention where torch's attention cannot have the heads that are left."""
    for path, module in [*model.named_modules()]:
        if isinstance(module, nn.MultiheadAttention) and module.out_proj.weight.numel():
            width = module.out_proj.out_features
            heads = module.num_heads * module.head_dim
            if {heads, module.out_proj.in_features, len(module.in_proj_weight) // 3} != {width}:
                exchange(model, path, SlimAttention)
            else:
                module.embed_dim = module.kdim = module.vdim = width


# looking inside


@contextmanager
def opened(model: nn.Module, structure: Structure) -> Iterator[Structure]:
    """Inside the context, hooks see what enters ``out_proj``, and q, k and v.

    Every attention of the model computes the same by other calls; its packed projection is a Linear
    ``in_proj`` of the same weights, which puts out q, k and v side by side. It is no module of the
    model, whose tensors keep their names; the Structure that is handed over calls them by those of
    the Linear. Everything is as before on leaving, also by an exception.
    """
    names = {name: name.replace(".in_proj_", f".{PROJECTION}.") for name in structure.tensors}
    packed = {
        name.rpartition(".")[0]: dims
        for name, dims in structure.tensors.items()
        if name.endswith(".in_proj_weight")
    }
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, (nn.MultiheadAttention, SlimAttention)) and not _is_open(module):
                vars(module)[PROJECTION] = _projection(module)
                undo.callback(vars(module).pop, PROJECTION)
                undo.callback(exchange_forward(module, _forward, module))
        yield replace(
            structure,
            tensors={names[name]: layout for name, layout in structure.tensors.items()},
            ties={names[name]: names[first] for name, first in structure.ties.items()},
            work=[
                replace(work, module=f"{work.module}.{PROJECTION}")
                if packed.get(work.module) == work.dims
                else work
                for work in structure.work
            ],
        )


def _is_open(attention: nn.Module) -> bool:
    return getattr(vars(attention).get("forward"), "func", None) is _forward


def _projection(attention: Any) -> nn.Linear:
    """The packed projection, sharing its parameters."""
    rows, columns = attention.in_proj_weight.shape
    linear = nn.Linear(columns, rows, bias=attention.in_proj_bias is not None, device="meta")
    linear.weight, linear.bias = attention.in_proj_weight, attention.in_proj_bias
    return linear


def _forward(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    """Self attention as torchvision's EncoderBlock calls it; (B, N, C) in, out."""
    check_plain_call(query, key, value, *args, **options)
    projection: nn.Linear = vars(attention)[PROJECTION]
    # whoever casts or moves a model looks for tensors in its modules
    projection._parameters |= {
        "weight": attention.in_proj_weight,
        "bias": attention.in_proj_bias,
    }
    return attended(attention, projection(query)), None


# saving


def construct(model: Any) -> ConstructorCall:
    """The arguments that decide which modules there are."""
    if len(_convs(model)) > 1:
        raise UnsupportedArchitecture(
            "save: conv_proj must be one convolution, got a convolutional stem, which no plain "
            "values describe; save its state_dict"
        )
    blocks = [*model.encoder.layers.children()]
    width, norm = model.hidden_dim, model.encoder.ln
    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "in_proj_weight")]
    heads = attentions[0].num_heads if attentions else 1
    args = {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_layers": len(blocks),
        "num_heads": heads if heads and width % heads == 0 else 1,
        "hidden_dim": width,
        "mlp_dim": model.mlp_dim,
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "num_classes": model.num_classes,
        "representation_size": model.representation_size,
        "norm_layer": {"class": qualified(type(norm)), "eps": norm.eps},
    }
    return {"class": qualified(type(model)), "args": args}


def images(model: Any) -> Shape:
    """Channels, and the one size it takes."""
    return (_convs(model)[0][1].in_channels, model.image_size, model.image_size)


def halves(block: Any, core: str) -> tuple[str, ...]:
    """The parts around the attention or the MLP, in the order of ``EncoderBlock``."""
    return ("ln_1", core, "dropout") if core == "self_attention" else ("ln_2", core)


FAMILY = Family(
    describe,
    construct,
    images,
    blocks=lambda _: ("encoder.layers",),
    halves=halves,
    swaps=(
        "torch.nn.modules.normalization.LayerNorm",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.linear.Identity",
    ),
    pairs=("self_attention",),
    fitting=fitting,
    opened=opened,
)
