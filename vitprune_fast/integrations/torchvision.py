"""torchvision's ``vit_b_16`` and its family, whose attention is ``nn.MultiheadAttention``.

That module multiplies with ``out_proj`` inside one function, so no hook sees what enters it. While
scoring, its forward is exchanged for the same computation in visible steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import scoring
from ..errors import UnsupportedArchitecture
from ..modules.swap import Altered
from ..scoring import Scores
from ..structure.axes import Axis
from ..structure.builder import Builder
from ..structure.paths import get
from ..structure.table import Structure
from .layout import Inner, attention_axes, branch

__all__ = ["score", "units", "visible_attention"]

# the packed projection of q, k and v as a module: it is a bare weight otherwise
PROJECTION = "in_proj"


def score(
    model: nn.Module,
    batches: Iterable[Sequence[Any]] | None = None,
    criterion: Any = "taylor",
    **options: Any,
) -> Scores:
    """:func:`vitprune_fast.score` for a torchvision VisionTransformer.

    Args:
        model: a ``torchvision.models.VisionTransformer``; it comes back exactly as it was.
        batches: yields (images, labels, ...).
        criterion: as in the core.
        options: all other arguments of :func:`vitprune_fast.score`, except ``structure``.

    Returns:
        Scores of axes such as ``encoder.layers.encoder_layer_3.self_attention.heads`` and
        ``encoder.layers.encoder_layer_3.mlp.neurons``.

    Raises:
        InvalidInput: as the core.
        UnsupportedArchitecture: as :func:`units`.
    """
    structure = units(model)
    # while it is visible, the packed projection has the names of a Linear
    names = {name: name.replace(".in_proj_", f".{PROJECTION}.") for name in structure.tensors}
    tensors = {names[name]: layout for name, layout in structure.tensors.items()}
    with visible_attention(model):
        visible = replace(structure, tensors=tensors)
        return scoring.score(model, batches, criterion, structure=visible, **options)


def units(model: nn.Module) -> Structure:
    """What can be scored in a torchvision VisionTransformer.

    Heads, v dims, q/k dims, neurons, embedding channels, branches and blocks. What is in the
    attention can be measured inside :func:`visible_attention` alone, where ``score`` does it. The
    Structure is for scoring and for :mod:`vitprune_fast.integrations.nn_prune`; ``prune`` and
    ``mask`` do not know these models.

    Raises:
        UnsupportedArchitecture: the model is something else, or one of its blocks is.
    """
    from torchvision.models import VisionTransformer

    if type(model) is not VisionTransformer:
        raise UnsupportedArchitecture(
            "integrations.torchvision: model must be a torchvision VisionTransformer, "
            f"got {type(model).__name__}"
        )
    t = Builder(model, "torchvision VisionTransformer", (3, model.image_size, model.image_size))
    embed = t.axis("embed", model.hidden_dim, "embed")
    t.tensor("class_token", 1, ..., embed)
    t.tensor("encoder.pos_embedding", 1, ..., embed)
    # the last convolution of a stem writes the stream, the only one of a plain patch embedding
    patches = "conv_proj" if isinstance(model.conv_proj, nn.Conv2d) else "conv_proj.conv_last"
    t.linear(patches, embed, get(model, patches).in_channels, model.seq_length - 1)
    t.stem(embed, "encoder.pos_embedding")
    for name, block in model.encoder.layers.named_children():
        _block(t, f"encoder.layers.{name}", block, embed, model.seq_length)
    t.norm("encoder.ln", embed)
    first = get(model, "heads.pre_logits") or model.heads.head
    path = "heads.head" if first is model.heads.head else "heads.pre_logits"
    if isinstance(first, nn.Linear):
        t.linear(path, first.out_features, embed, 1)
    t.reader(embed, "heads", "encoder.ln")
    t.branch_axes()
    return t.structure


def _block(t: Builder, path: str, block: Any, embed: Axis, tokens: int) -> None:
    from torchvision.models.vision_transformer import EncoderBlock, MLPBlock

    if type(block) is not EncoderBlock or type(block.mlp) is not MLPBlock:
        raise UnsupportedArchitecture(
            f"integrations.torchvision: {path} must be an EncoderBlock with an MLPBlock, "
            f"got {type(block).__name__}"
        )
    attn = ("attn_branch", _attention, "self_attention", "ln_1")
    for kind, core, leaf, norm in (attn, ("mlp_branch", _mlp, "mlp", "ln_2")):
        t.norm(f"{path}.{norm}", embed)
        inner = core(t, f"{path}.{leaf}", embed, tokens)
        branch(t, f"{path}.{leaf}", embed, kind, inner, f"{path}.{norm}")
    t.structure.blocks[path] = (f"{path}.self_attention", f"{path}.mlp")


def _attention(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Packed q, k and v of one head_dim."""
    module = get(t.model, path)
    plain = (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.batch_first
        and module.bias_k is None
        and not module.add_zero_attn
    )
    if not plain:
        raise UnsupportedArchitecture(
            f"integrations.torchvision: {path} must be nn.MultiheadAttention with batch_first and "
            f"packed weights, without bias_k and add_zero_attn, got {type(module).__name__}"
        )
    count, width = module.num_heads, module.embed_dim
    heads, qk, v = attention_axes(t, path, count, width // count)
    packed = heads * qk + heads * qk + heads * v
    t.tensor(f"{path}.in_proj_weight", packed, embed)
    t.tensor(f"{path}.in_proj_bias", packed)
    t.linear(f"{path}.out_proj", embed, heads * v, tokens)
    t.work(f"{path}.{PROJECTION}", tokens, packed, embed)
    t.work(path, tokens * tokens, heads * qk)
    t.work(path, tokens * tokens, heads * v)
    t.tap(heads, f"{path}.out_proj", heads * v)
    t.tap(v, f"{path}.out_proj", heads * v)
    t.tap(qk, f"{path}.{PROJECTION}", heads * qk, "output", (0, width))
    return heads * v, f"{path}.out_proj"


def _mlp(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    """Linear, GELU, dropout, Linear, dropout in one Sequential."""
    neurons = t.axis(f"{path}.neurons", get(t.model, f"{path}.3").in_features, "neuron")
    t.linear(f"{path}.0", neurons, embed, tokens)
    t.linear(f"{path}.3", embed, neurons, tokens)
    t.tap(neurons, f"{path}.3", neurons)
    return neurons, f"{path}.3"


@contextmanager
def visible_attention(model: nn.Module) -> Iterator[None]:
    """Inside the context, hooks see what enters ``out_proj``, and q, k and v.

    Every ``nn.MultiheadAttention`` of the model computes the same by other calls; its packed
    projection is a Linear ``in_proj`` of the same weights, which puts out q, k and v side by side.
    Everything is as before on leaving, also by an exception.
    """
    attentions: list[Any] = [
        module
        for module in model.modules()
        # inside another such context they are visible already
        if type(module) is nn.MultiheadAttention and PROJECTION not in module._modules
    ]
    with Altered() as altered:
        for module in attentions:
            module.add_module(PROJECTION, _projection(module))
            altered.callback(module._modules.pop, PROJECTION, None)
            altered.exchange(module, _forward, module)
        yield


def _projection(attention: Any) -> nn.Linear:
    """The packed projection, sharing its parameters."""
    rows, columns = attention.in_proj_weight.shape
    linear = nn.Linear(columns, rows, bias=attention.in_proj_bias is not None, device="meta")
    linear.weight, linear.bias = attention.in_proj_weight, attention.in_proj_bias
    return linear


def _forward(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    need_weights: bool = True,
    **masks: Any,
) -> tuple[Tensor, None]:
    """Self attention without masks, as torchvision's EncoderBlock calls it; (B, N, C) in, out."""
    masked = any(mask is not None and mask is not False for mask in masks.values())
    if query is not key or key is not value or need_weights or masked:
        raise UnsupportedArchitecture(
            "integrations.torchvision: nn.MultiheadAttention must be called on one tensor, without "
            "masks and weights, as torchvision's EncoderBlock does"
        )
    qkv = attention.in_proj(query)
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    dropout = attention.dropout if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return attention.out_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), None
