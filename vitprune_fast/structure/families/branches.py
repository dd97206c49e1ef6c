"""What blocks of all libraries have in common: an attention and an MLP on a residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import InvalidInput, UnsupportedArchitecture
from ...modeling_pruned import Constant
from ..axes import Axis, Dim
from ..builder import Builder
from ..paths import get, put

# what reaches the output projection of a branch, and the path of that projection
Inner = tuple[Axis | Dim, str]
Core = Callable[[Builder, str, Axis, int], Inner]


@dataclass(frozen=True)
class Part:
    """One branch of a block; paths are below the block.

    Args:
        core: path of the attention or MLP.
        kind: ``"attn_branch"`` or ``"mlp_branch"``.
        norm: path of the norm before it, or behind it.
        layout: ``(builder, path, embed, tokens)``: declares the core, and says what it ends in.
        gain: path of the weight of its LayerScale; empty where there is none.
        drop: path of its drop path; empty where the module that holds the gain, or the output
            projection, writes to the stream.
    """

    core: str
    kind: str
    norm: str
    layout: Core
    gain: str = ""
    drop: str = ""


def describe_block(
    t: Builder,
    path: str,
    parts: Sequence[Part],
    embed: Axis,
    tokens: int,
    *,
    post_norm: bool = False,
) -> None:
    """The branches of a block that it has; one that became a constant writes its bias.

    A branch is ``x + gain * core(norm(x))``, or ``x + norm(core(x))`` where ``post_norm``.
    """
    constant, branches = False, []
    for part in parts:
        core = f"{path}.{part.core}"
        module = get(t.model, core)
        if module is None:
            continue
        norm, gain = f"{path}.{part.norm}", f"{path}.{part.gain}" if part.gain else ""
        t.norm(norm, embed)
        inner, out = None, core
        if isinstance(module, Constant):
            constant = True
            t.tensor(f"{core}.bias", embed)
        else:
            inner, out = part.layout(t, core, embed, tokens)
        # a dropout behind what is added to the stream may serve others too
        drop = f"{path}.{part.drop}" if part.drop else gain.rpartition(".")[0] or out
        t.branch(
            core,
            embed,
            part.kind,
            inner,
            out=out,
            norm=norm,
            gain=gain,
            post_norm=post_norm,
            drop=drop,
        )
        if inner is None:
            continue
        branches.append(core)
        if post_norm:
            t.reader(embed, core)
            t.writer_norm(embed, norm)
        else:
            t.reader(embed, core, norm)
    if branches and not constant:
        t.structure.blocks[path] = tuple(branches)


def require(t: Builder, path: str, *classes: type) -> Any:
    """The module at ``path``, which has to be of one of the classes; subclasses are others.

    Raises:
        UnsupportedArchitecture: it is not.
    """
    module = get(t.model, path)
    if type(module) not in classes:
        raise UnsupportedArchitecture(
            f"describe: {path} must be one of {', '.join(c.__name__ for c in classes)}, "
            f"got {type(module).__name__}"
        )
    return module


def attention_axes(
    t: Builder, path: str, heads: int, queries: int, values: int
) -> tuple[Axis, Axis, Axis]:
    """Heads, and the q/k and v dims of each, of so many rows of queries and of values."""
    parent = t.axis(f"{path}.heads", heads, "head")
    qk = t.axis(f"{path}.qk_dims", queries, "qk_dim", parent)
    v = t.axis(f"{path}.v_dims", values, "v_dim", parent)
    t.box(qk)
    t.box(v)
    return parent, qk, v


def exchange(model: nn.Module, path: str, stand_in: Any) -> None:
    """Put a stand-in in the place of a module whose class cannot have the sizes that are left.

    Raises:
        InvalidInput: it runs a forward of its own, which would be lost.
    """
    module = get(model, path)
    if "forward" in vars(module):
        raise InvalidInput(
            f"prune: {path} must run the forward of its class where that cannot have the heads and "
            "dims that are left, got one of its own; put it back, or keep all heads and dims"
        )
    put(model, path, stand_in.of(module))


def all_alike(sizes: Iterable[int]) -> int | None:
    """The one size there is, but for 0 of what is emptied; None where there are others, or none."""
    found = {*sizes} - {0}
    return found.pop() if len(found) == 1 else None
