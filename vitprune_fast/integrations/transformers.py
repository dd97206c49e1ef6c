"""Hugging Face transformers 5: scores of ViT, DeiT and DINOv2 classifiers.

Read it beside ``transformers/models/{vit,deit,dinov2}/modeling_*.py``: every line states one fact
of those files. They named their parts anew in 5.9 (ViT, DeiT) and 5.18 (DINOv2); which names hold
is read from the model. Nothing here imports transformers: whoever has such a model has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import scoring
from ..errors import UnsupportedArchitecture
from ..modules.swap import Altered
from ..scoring import Scores
from ..structure.axes import Axis
from ..structure.builder import Builder
from ..structure.paths import get
from ..structure.table import Structure
from .layout import Inner, attention_axes, branch

__all__ = ["score", "units"]


@dataclass(frozen=True)
class _Family:
    """Where a classifier keeps its parts; paths of norms and gains are below a block."""

    base: str
    norms: tuple[str, str]
    gains: tuple[str, str] = ("", "")
    classifiers: tuple[str, ...] = ("classifier",)
    # how many times the width of the stream a classifier reads
    reads: int = 1


_VIT = _Family("vit", ("layernorm_before", "layernorm_after"))
_DINO = _Family(
    "dinov2",
    ("norm1", "norm2"),
    ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    # the class token beside the mean of the patches
    reads=2,
)
_FAMILIES = {
    "ViTForImageClassification": _VIT,
    "DeiTForImageClassification": _Family("deit", _VIT.norms),
    "DeiTForImageClassificationWithTeacher": _Family(
        "deit", _VIT.norms, classifiers=("cls_classifier", "distillation_classifier")
    ),
    "Dinov2ForImageClassification": _DINO,
    "Dinov2WithRegistersForImageClassification": _Family(
        "dinov2_with_registers", _DINO.norms, _DINO.gains, reads=2
    ),
}


# names of the same parts in different versions, the newest first: a model has one row of each
_BLOCKS = (("layers",), ("encoder.layer",))
# of q, k, v and out, and of the numbers of heads and of dims in each, below ``attention``
_ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "head_dim"),
    (
        "attention.query",
        "attention.key",
        "attention.value",
        "output.dense",
        "attention.num_attention_heads",
        "attention.attention_head_size",
    ),
)
# the Linears of an MLP, below a block
_MLPS = (
    ("mlp.fc1", "mlp.fc2"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp.weights_in", "mlp.weights_out"),
    ("intermediate.dense", "output.dense"),
)


def score(
    model: nn.Module,
    batches: Iterable[Sequence[Any]] | None = None,
    criterion: Any = "taylor",
    **options: Any,
) -> Scores:
    """:func:`vitprune_fast.score` for a transformers classifier.

    Args:
        model: one that :func:`units` knows; it comes back exactly as it was.
        batches: yields (pixel_values (B, C, H, W), labels, ...).
        criterion: as in the core.
        options: all other arguments of :func:`vitprune_fast.score`, except ``structure``.

    Returns:
        Scores of axes such as ``vit.layers.3.attention.heads`` and ``vit.layers.3.mlp.neurons``,
        before transformers 5.9 ``vit.encoder.layer.3.attention.heads`` and
        ``vit.encoder.layer.3.intermediate.neurons``.

    Raises:
        InvalidInput: as the core.
        UnsupportedArchitecture: as :func:`units`.
    """
    structure = units(model)
    with _returning_logits(model):
        return scoring.score(model, batches, criterion, structure=structure, **options)


def units(model: nn.Module) -> Structure:
    """What can be scored in a transformers classifier, for ``vitprune_fast.score(structure=)``.

    Heads, v dims, q/k dims, neurons (SwiGLU included), embedding channels, branches and blocks. The
    Structure is for scoring and for :mod:`vitprune_fast.integrations.nn_prune`; ``prune`` and
    ``mask`` do not know these models.

    Axes have the paths of the modules that hold them, so that their names are those of the
    installed version.

    Raises:
        UnsupportedArchitecture: the class of the model is not one of those above, or its modules
            have names that no version of transformers 5 gave them.
    """
    kind = type(model)
    family = _FAMILIES.get(kind.__name__)
    if family is None or not kind.__module__.startswith("transformers."):
        raise UnsupportedArchitecture(
            f"integrations.transformers: model must be one of {', '.join(_FAMILIES)}, "
            f"got {kind.__name__}"
        )
    config: Any = model.config
    size = config.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    embeddings = f"{family.base}.embeddings"
    patches: Any = get(model, f"{embeddings}.patch_embeddings")
    positions: Tensor = get(model, f"{embeddings}.position_embeddings")
    registers = get(model, f"{embeddings}.register_tokens")
    tokens = positions.shape[1] + (0 if registers is None else registers.shape[1])

    t = Builder(model, kind.__name__, (config.num_channels, height, width))
    embed = t.axis("embed", patches.projection.out_channels, "embed")
    for name in ("cls_token", "distillation_token", "register_tokens", "position_embeddings"):
        t.tensor(f"{embeddings}.{name}", 1, ..., embed)
    t.linear(
        f"{embeddings}.patch_embeddings.projection", embed, config.num_channels, patches.num_patches
    )
    t.stem(embed, f"{embeddings}.position_embeddings")
    (name,) = _names(model, family.base, _BLOCKS)
    blocks = f"{family.base}.{name}"
    for i in range(len(get(model, blocks))):
        _block(t, f"{blocks}.{i}", family, embed, tokens)
    t.norm(f"{family.base}.layernorm", embed)
    for name in family.classifiers:
        outputs = getattr(get(model, name), "out_features", 0)
        read = embed + embed if family.reads == 2 else embed
        t.linear(name, outputs, read, 1)
    t.reader(embed, family.base, f"{family.base}.layernorm")
    t.branch_axes()
    return t.structure


def _names(model: nn.Module, path: str, rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The row of names that the module at ``path`` has."""
    for row in rows:
        if all(get(model, f"{path}.{name}") is not None for name in row):
            return row
    wanted = "; or ".join(", ".join(row) for row in rows)
    raise UnsupportedArchitecture(
        f"integrations.transformers: {path} must have {wanted}, "
        f"got {type(get(model, path)).__name__} with other names"
    )


def _block(t: Builder, path: str, family: _Family, embed: Axis, tokens: int) -> None:
    """Attention and MLP, each behind a norm and before a LayerScale, where there is one."""
    branches = []
    parts = (("attn_branch", _attention), ("mlp_branch", _mlp))
    for (kind, core), norm, gain in zip(parts, family.norms, family.gains, strict=True):
        t.norm(f"{path}.{norm}", embed)
        name, inner = core(t, path, embed, tokens)
        branch(t, name, embed, kind, inner, f"{path}.{norm}", f"{path}.{gain}" if gain else "")
        branches.append(name)
    t.structure.blocks[path] = tuple(branches)


def _attention(t: Builder, block: str, embed: Axis, tokens: int) -> tuple[str, Inner]:
    """Separate projections, one head_dim for q, k and v."""
    path = f"{block}.attention"
    q, k, v, out, *sizes = (f"{path}.{name}" for name in _names(t.model, path, _ATTENTIONS))
    heads, qk_dims, v_dims = attention_axes(t, path, *(get(t.model, size) for size in sizes))
    for projection, dims in ((q, qk_dims), (k, qk_dims), (v, v_dims)):
        t.linear(projection, heads * dims, embed, tokens)
    t.linear(out, embed, heads * v_dims, tokens)
    t.work(path, tokens * tokens, heads * qk_dims)
    t.work(path, tokens * tokens, heads * v_dims)
    t.tap(heads, out, heads * v_dims)
    t.tap(v_dims, out, heads * v_dims)
    t.tap(qk_dims, q, heads * qk_dims, "output")
    return path, (heads * v_dims, out)


def _mlp(t: Builder, block: str, embed: Axis, tokens: int) -> tuple[str, Inner]:
    """Two Linears, or those of a SwiGLU, whose gate and value may be packed into one."""
    *first, last = (f"{block}.{name}" for name in _names(t.model, block, _MLPS))
    path = first[0].rpartition(".")[0]
    size = get(t.model, last).in_features
    neurons = t.axis(f"{path}.neurons", size, "neuron")
    for name in first:
        packed = get(t.model, name).out_features == 2 * size
        t.linear(name, neurons + neurons if packed else neurons, embed, tokens)
    t.linear(last, embed, neurons, tokens)
    t.tap(neurons, last, neurons)
    # the module around a last Linear apart from the first adds the stream to what that puts out
    return (path if last.startswith(f"{path}.") else last), (neurons, last)


@contextmanager
def _returning_logits(model: nn.Module) -> Iterator[None]:
    """The model hands back its logits alone; a hook, so that paths into it stay what they are."""
    with Altered() as altered:
        altered.after(model, lambda module, inputs, output: output.logits)
        yield
