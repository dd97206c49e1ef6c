"""What the tables of other libraries' Vision Transformers have in common: pre-norm blocks."""

from __future__ import annotations

from ..structure.axes import Axis, Dim
from ..structure.builder import Builder

# what reaches the output projection of a branch, and the path of that projection
Inner = tuple[Axis | Dim, str]


def branch(
    t: Builder,
    path: str,
    embed: Axis,
    kind: str,
    inner: Inner,
    norm: str,
    gain: str = "",
) -> None:
    """``x + gain * out(core(norm(x)))``; ``gain`` is the path of a LayerScale's weight."""
    what, out = inner
    # a dropout behind what is added to the stream may serve others too
    drop = gain.rpartition(".")[0] or out
    t.branch(path, embed, kind, what, out=out, norm=norm, gain=gain, drop=drop)
    t.reader(embed, path, norm)


def attention_axes(t: Builder, path: str, heads: int, head_dim: int) -> tuple[Axis, Axis, Axis]:
    """Heads, and the q/k and v dims of each."""
    parent = t.axis(f"{path}.heads", heads, "head")
    qk = t.axis(f"{path}.qk_dims", heads * head_dim, "qk_dim", parent)
    v = t.axis(f"{path}.v_dims", heads * head_dim, "v_dim", parent)
    return parent, qk, v
