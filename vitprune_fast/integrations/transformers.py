"""Hugging Face transformers 5.18 and newer: scores of ViT, DeiT and DINOv2 classifiers.

Read it beside ``transformers/models/{vit,deit,dinov2}/modeling_*.py``: every line states one fact
of those files. Nothing here imports transformers: whoever has such a model has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import scoring
from ..errors import UnsupportedArchitecture
from ..scoring import Scores
from ..structure.axes import Axis, Structure
from ..structure.paths import get
from ..structure.table import Table
from .layout import Inner, attention_axes, branch, branch_axes

__all__ = ["score", "units"]


@dataclass(frozen=True)
class _Family:
    """Where a classifier keeps its parts; paths of blocks and norms are below ``base``."""

    base: str
    blocks: str
    norms: tuple[str, str]
    gains: tuple[str, str] = ("", "")
    classifiers: tuple[str, ...] = ("classifier",)
    # how many times the width of the stream a classifier reads
    reads: int = 1


_VIT = _Family("vit", "layers", ("layernorm_before", "layernorm_after"))
_DINO = _Family(
    "dinov2",
    "encoder.layer",
    ("norm1", "norm2"),
    ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    # the class token beside the mean of the patches
    reads=2,
)
_FAMILIES = {
    "ViTForImageClassification": _VIT,
    "DeiTForImageClassification": _Family("deit", "layers", _VIT.norms),
    "DeiTForImageClassificationWithTeacher": _Family(
        "deit",
        "layers",
        _VIT.norms,
        classifiers=("cls_classifier", "distillation_classifier"),
    ),
    "Dinov2ForImageClassification": _DINO,
    "Dinov2WithRegistersForImageClassification": _Family(
        "dinov2_with_registers", _DINO.blocks, _DINO.norms, _DINO.gains, reads=2
    ),
}


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
        Scores of axes such as ``vit.layers.3.attention.heads`` and ``vit.layers.3.mlp.neurons``.

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

    Raises:
        UnsupportedArchitecture: the class of the model is not one of those above, or it comes from
            transformers older than 5.18.
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

    t = Table(model, kind.__name__, (config.num_channels, height, width))
    embed = t.axis("embed", patches.projection.out_channels, "embed")
    for name in ("cls_token", "distillation_token", "register_tokens", "position_embeddings"):
        t.tensor(f"{embeddings}.{name}", 1, ..., embed)
    t.linear(
        f"{embeddings}.patch_embeddings.projection", embed, config.num_channels, patches.num_patches
    )
    t.stem(f"{embeddings}.position_embeddings")
    blocks = f"{family.base}.{family.blocks}"
    layers = get(model, blocks)
    if layers is None:
        raise UnsupportedArchitecture(
            f"integrations.transformers: model must have {blocks}, as from transformers 5.18 on, "
            f"got {kind.__name__} without it"
        )
    for i in range(len(layers)):
        _block(t, f"{blocks}.{i}", family, embed, tokens)
    t.norm(f"{family.base}.layernorm", embed)
    for name in family.classifiers:
        outputs = getattr(get(model, name), "out_features", 0)
        read = embed + embed if family.reads == 2 else embed
        t.linear(name, outputs, read, 1)
    t.reader(embed, family.base, f"{family.base}.layernorm")
    branch_axes(t, "attention", "mlp")
    return t.structure


def _block(t: Table, path: str, family: _Family, embed: Axis, tokens: int) -> None:
    """Attention and MLP, each behind a norm and before a LayerScale, where there is one."""
    cores = (("attention", _attention), ("mlp", _mlp))
    for (name, core), norm, gain in zip(cores, family.norms, family.gains, strict=True):
        t.norm(f"{path}.{norm}", embed)
        inner = core(t, f"{path}.{name}", embed, tokens)
        scale = f"{path}.{gain}" if gain else ""
        branch(t, f"{path}.{name}", inner, embed, f"{path}.{norm}", scale)
    t.structure.blocks[path] = (f"{path}.attention", f"{path}.mlp")


def _attention(t: Table, path: str, embed: Axis, tokens: int) -> Inner:
    """Separate projections, one head_dim for q, k and v."""
    module = get(t.model, path)
    if getattr(module, "q_proj", None) is None:
        raise UnsupportedArchitecture(
            f"integrations.transformers: {path} must have separate q_proj, k_proj and v_proj, "
            f"got {type(module).__name__}"
        )
    heads, qk, v = attention_axes(t, path, module.num_attention_heads, module.head_dim)
    for name, dims in (("q_proj", qk), ("k_proj", qk), ("v_proj", v)):
        t.linear(f"{path}.{name}", heads * dims, embed, tokens)
    t.linear(f"{path}.o_proj", embed, heads * v, tokens)
    t.work(path, tokens * tokens, heads * qk)
    t.work(path, tokens * tokens, heads * v)
    t.tap(heads, f"{path}.o_proj", heads * v)
    t.tap(v, f"{path}.o_proj", heads * v)
    t.tap(qk, f"{path}.q_proj", heads * qk, "output")
    return heads * v, f"{path}.o_proj"


def _mlp(t: Table, path: str, embed: Axis, tokens: int) -> Inner:
    """fc1 and fc2, or the gate, up and down projections of a SwiGLU."""
    gated = get(t.model, f"{path}.down_proj") is not None
    first, last = (("gate_proj", "up_proj"), "down_proj") if gated else (("fc1",), "fc2")
    out = f"{path}.{last}"
    neurons = t.axis(f"{path}.neurons", get(t.model, out).in_features, "neuron")
    for name in first:
        t.linear(f"{path}.{name}", neurons, embed, tokens)
    t.linear(out, embed, neurons, tokens)
    t.tap(neurons, out, neurons)
    return neurons, out


@contextmanager
def _returning_logits(model: nn.Module) -> Iterator[None]:
    """The model hands back its logits alone; a hook, so that paths into it stay what they are."""

    handle = model.register_forward_hook(lambda module, inputs, output: output.logits)
    try:
        yield
    finally:
        handle.remove()
