"""The table: which units a model has, and which entries of which tensors belong to them.

An *axis* is an ordered set of removable units. Every dimension of every parameter and buffer is a
concatenation of products of axes and fixed sizes, outermost first, written with ``+`` and ``*``:
``heads * qk_dims + heads * qk_dims + heads * v_dims``. Scores, cost, masks and surgery read only
this table; the adapters in this folder write it, one file per model family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import InvalidInput

UNIT_KINDS = (
    "head",
    "qk_dim",
    "v_dim",
    "neuron",
    "embed",
    "attn_branch",
    "mlp_branch",
    "block",
)


class _Algebra:
    """``+`` concatenates and ``*`` nests, outermost first."""

    def __add__(self, other: Axis | Dim | int) -> Dim:
        return Dim(as_dim(self).parts + as_dim(other).parts)

    def __mul__(self, other: Axis | Dim | int) -> Dim:
        return Dim(tuple(a + b for a in as_dim(self).parts for b in as_dim(other).parts))

    def __rmul__(self, other: int) -> Dim:
        return Dim(tuple((other, *part) for part in as_dim(self).parts))


@dataclass(frozen=True)
class Axis(_Algebra):
    """An ordered set of removable units.

    ``size`` counts all units. With a ``parent``, every parent unit owns ``width`` of them, numbered
    ``parent * width + j``; each parent keeps its own subset, and losing the parent loses them.
    """

    name: str
    size: int
    kind: str
    parent: Axis | None = None

    @property
    def width(self) -> int:
        """Units per parent unit (all of them when there is no parent)."""
        return self.size // self.parent.size if self.parent else self.size


@dataclass(frozen=True)
class Dim(_Algebra):
    """One tensor dimension: a concatenation of products of axes and fixed sizes."""

    parts: tuple[tuple[Axis | int, ...], ...]

    def length(self, extent: Mapping[str, int] | None = None) -> int:
        """Number of entries; ``extent`` gives the stored width of axes that differ from full."""
        return sum(math.prod(_extent(f, extent or {}) for f in part) for part in self.parts)


def as_dim(value: _Algebra | int) -> Dim:
    """A single axis or fixed size as a Dim."""
    if isinstance(value, Dim):
        return value
    assert isinstance(value, (Axis, int))
    return Dim(((value,),))


def _axes_of(dim: Dim) -> list[Axis]:
    return [factor for part in dim.parts for factor in part if isinstance(factor, Axis)]


def _extent(factor: Axis | int, extent: Mapping[str, int]) -> int:
    return factor if isinstance(factor, int) else extent.get(factor.name, factor.width)


@dataclass(frozen=True)
class Write:
    """One write into a residual stream, in execution order: the stem, then each branch.

    Args:
        name: module path of the branch, or ``"stem"``.
        bias: adding a vector to all of these tensors adds it once to every token of the stream.
        weight: the matrix that produces the written value (``None`` for the stem).
        gain: the LayerScale that multiplies it; absorbed into weight and bias before a fold.
        tail: post-norm blocks: (inner bias, norm module), the constant is ``norm(inner bias)``.
        inner: what reaches the output projection; empty means that only a constant is written, None
            that nothing else ever was (the stem, and a branch that is a constant already).
        helpers: modules that die with the branch (norm, LayerScale, drop path).
    """

    name: str
    bias: tuple[str, ...]
    weight: str | None = None
    gain: str | None = None
    tail: tuple[str, str] | None = None
    inner: Dim | None = None
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True)
class SoftmaxScale:
    """The softmax temperature of an attention module is ``width ** -0.5``.

    ``queries`` are the tensors whose first part along dimension 0 makes up for another width.
    """

    module: str
    width: Axis
    queries: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one product: ``positions * prod(lengths of dims)``."""

    module: str
    positions: int
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Tap:
    """Where units can be gated: the last dimension of what enters or leaves a module.

    Args:
        module: path of the module.
        dim: layout of the dimension (of the part, where there is one).
        side: ``"input"`` or ``"output"``.
        part: first and last + 1 column; None is all of them.
    """

    module: str
    dim: Dim
    side: Literal["input", "output"] = "input"
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reader:
    """A place that sees the width of a residual stream.

    ``norm``: the norm ``module`` reads the stream, and what it puts out is read. ``direct``: the
    input of ``module`` is the stream itself. ``statistics``: the norm ``module`` stands in a write
    into the stream, so that removed channels change its statistics and nothing else.
    """

    module: str
    how: Literal["norm", "direct", "statistics"]


@dataclass
class Structure:
    """What can be removed from a model. Written by an adapter, read by everything else."""

    family: str
    input_size: tuple[int, int, int]
    axes: dict[str, Axis] = field(default_factory=dict)
    # every parameter and buffer
    tensors: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    # further names of tied parameters -> the first name
    ties: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    # sizes that modules repeat as attributes
    attrs: dict[str, Dim] = field(default_factory=dict)
    # axes stored at one common width: narrower sets are filled with zero rows
    boxes: list[tuple[Axis, ...]] = field(default_factory=list)
    # axes a norm reads across: zero filling would change its statistics
    unpaddable: set[str] = field(default_factory=set)
    scales: list[SoftmaxScale] = field(default_factory=list)
    stream: list[Write] = field(default_factory=list)
    # block path -> the branches it holds, in order
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # branch axis -> the branch each of its units stands for
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    taps: dict[str, Tap] = field(default_factory=dict)
    # axis of a residual stream -> where it is read
    readers: dict[str, list[Reader]] = field(default_factory=dict)

    def units(self, kind: str) -> list[Axis]:
        """The axes of one unit kind, in model order."""
        if kind not in UNIT_KINDS:
            raise InvalidInput(
                f"Structure.units: kind must be one of {', '.join(UNIT_KINDS)}, got {kind!r}"
            )
        return [axis for axis in self.axes.values() if axis.kind == kind]

    def is_tied(self, tensor: str | None) -> bool:
        """Whether a parameter has other names as well."""
        return tensor in self.ties or tensor in self.ties.values()

    def names(self, tensor: str) -> set[str]:
        """All names of a tensor."""
        first = self.ties.get(tensor, tensor)
        return {first, *(name for name, other in self.ties.items() if other == first)}

    def twins(self) -> list[tuple[Axis, ...]]:
        """Groups of axes that tied parameters run over, each in model order.

        A plan keeps the same units of all axes of a group, since they share their weights, or are
        stored at one width with axes that do.
        """
        groups: dict[str, dict[str, Axis]] = {}
        for one, other in self._tied_axes():
            group = groups.get(one.name, {one.name: one})
            group |= groups.get(other.name, {other.name: other})
            groups |= dict.fromkeys(group, group)
        distinct = {id(group): group for group in groups.values()}
        return [
            tuple(axis for name, axis in self.axes.items() if name in group)
            for group in distinct.values()
        ]

    def _tied_axes(self) -> Iterator[tuple[Axis, Axis]]:
        """Pairs of different axes that have to keep the same units."""
        # what cannot be filled is as wide as its own units are many
        boxes = {a.name: box for box in self.boxes for a in box if a.name not in self.unpaddable}
        for name, first in self.ties.items():
            for a, b in zip(self.tensors[first], self.tensors[name], strict=True):
                for one, other in zip(_axes_of(a), _axes_of(b), strict=True):
                    own, others = boxes.get(one.name, (one,)), boxes.get(other.name, (other,))
                    for left, right in zip(own, others, strict=True):
                        if left != right:
                            yield left, right

    def writes(self) -> Iterator[Write]:
        """The branches of the residual stream, without the stem."""
        return (write for write in self.stream if write.inner is not None)

    def held(self, axis: Axis) -> list[tuple[str, ...]]:
        """The branches that every unit of a branch or block axis stands for; empty for others."""
        if axis.kind == "block":
            return list(self.blocks.values())
        return [(name,) for name in self.branches.get(axis.name, ())]

    def owner(self, tensor: str) -> str | None:
        """The branch whose death takes this tensor with it, or None."""
        for write in self.writes():
            if tensor.startswith(tuple(f"{path}." for path in (write.name, *write.helpers))):
                return write.name
        return None

    def __str__(self) -> str:
        lines = [f"{self.family}, input {' x '.join(map(str, self.input_size))}"]
        for kind in UNIT_KINDS:
            if axes := self.units(kind):
                sizes = sorted({axis.size for axis in axes})
                each = " to ".join(str(s) for s in dict.fromkeys((sizes[0], sizes[-1])))
                lines.append(
                    f"  {kind:12s} {len(axes):3d} axes of {each} units: {axes[0].name}, ..."
                )
        return "\n".join(lines)
