"""What the tables of other libraries' Vision Transformers have in common: pre-norm blocks."""

from __future__ import annotations

from ..structure.axes import Axis, Dim, Write, as_dim
from ..structure.table import Table

# what reaches the output projection of a branch, and the path of that projection
Inner = tuple[Axis | Dim, str]


def branch(t: Table, path: str, inner: Inner, embed: Axis, norm: str, gain: str = "") -> None:
    """``x + gain * out(core(norm(x)))``; ``gain`` is the path of a LayerScale's weight."""
    what, out = inner
    if gain:
        t.tensor(gain, embed)
    # last the module whose output is added to the stream; a dropout behind it may serve others too
    helpers = (norm, gain.rpartition(".")[0] or out)
    t.structure.stream.append(
        Write(path, (f"{out}.bias",), f"{out}.weight", gain or None, None, as_dim(what), helpers)
    )
    t.reader(embed, path, norm)


def branch_axes(t: Table) -> None:
    """Axes of whole branches and blocks; every block holds its attention, then its MLP."""
    held = t.structure.blocks.values()
    for kind, paths in (("attn", [a for a, _ in held]), ("mlp", [m for _, m in held])):
        t.axis(f"{kind}_branches", len(paths), f"{kind}_branch")
        t.structure.branches[f"{kind}_branches"] = tuple(paths)
    t.axis("blocks", len(held), "block")


def attention_axes(t: Table, path: str, heads: int, head_dim: int) -> tuple[Axis, Axis, Axis]:
    """Heads, and the q/k and v dims of each."""
    parent = t.axis(f"{path}.heads", heads, "head")
    qk = t.axis(f"{path}.qk_dims", heads * head_dim, "qk_dim", parent)
    v = t.axis(f"{path}.v_dims", heads * head_dim, "v_dim", parent)
    return parent, qk, v
