"""What the blocks of several libraries have in common: ``x + gain * core(norm(x))``, twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...modeling_pruned import Constant
from ..axes import Axis, Dim
from ..builder import Builder
from ..paths import get

# what reaches the output projection of a branch, and the path of that projection
Inner = tuple[Axis | Dim, str]
Core = Callable[[Builder, str, Axis, int], Inner]


@dataclass(frozen=True)
class Part:
    """One branch of a block; paths are below the block.

    Args:
        core: path of the attention or MLP.
        kind: ``"attn_branch"`` or ``"mlp_branch"``.
        norm: path of the norm before it.
        layout: ``(builder, path, embed, tokens)``: declares the core, and says what it ends in.
        gain: path of the weight of its LayerScale; empty where there is none.
    """

    core: str
    kind: str
    norm: str
    layout: Core
    gain: str = ""


def describe_block(t: Builder, path: str, parts: Sequence[Part], embed: Axis, tokens: int) -> None:
    """Those branches of a block that it has; one that became a constant writes its bias."""
    constant, branches = False, []
    for part in parts:
        core = f"{path}.{part.core}"
        module = get(t.model, core)
        if module is None:
            continue
        norm, gain = f"{path}.{part.norm}", f"{path}.{part.gain}" if part.gain else ""
        t.norm(norm, embed)
        what, out = None, core
        if isinstance(module, Constant):
            constant = True
            t.tensor(f"{core}.bias", embed)
        else:
            what, out = part.layout(t, core, embed, tokens)
        # a dropout behind what is added to the stream may serve others too
        drop = gain.rpartition(".")[0] or out
        t.branch(core, embed, part.kind, what, out=out, norm=norm, gain=gain, drop=drop)
        if what is not None:
            t.reader(embed, core, norm)
            branches.append(core)
    if branches and not constant:
        t.structure.blocks[path] = tuple(branches)


def attention_axes(t: Builder, path: str, heads: int, head_dim: int) -> tuple[Axis, Axis, Axis]:
    """Heads, and the q/k and v dims of each."""
    parent = t.axis(f"{path}.heads", heads, "head")
    qk = t.axis(f"{path}.qk_dims", heads * head_dim, "qk_dim", parent)
    v = t.axis(f"{path}.v_dims", heads * head_dim, "v_dim", parent)
    return parent, qk, v


def all_alike(sizes: Iterable[int]) -> int | None:
    """The one size there is, but for 0 of what is emptied; None where there are others, or none."""
    found = {*sizes} - {0}
    return found.pop() if len(found) == 1 else None
