"""The table: which units a model has, and which entries of which tensors belong to them.

Scores, cost, masks and surgery read only this table; a builder fills it, from what the file of a
model's family declares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import InvalidInput
from .axes import UNIT_KINDS, Axis, Dim, Group
from .places import Place
from .terms import Terms


@dataclass(frozen=True)
class Write:
    """One write into a residual stream, in execution order: the stem, then each branch.

    A model of stages has a stream for each, which begins with a stem of its own.

    A branch is ``x + drop(gain * projection(inner))`` of ``norm(x)``; where ``post_norm``, the norm
    stands behind the projection and nothing before it.

    Args:
        name: module path of the branch, or ``"stem"``.
        dim: layout of the stream it writes into.
        bias: adding a vector to all of these tensors adds it once to every token of the stream.
        projection: path of the module that makes what is written; empty for the stem.
        inner: what reaches the projection; empty means that only a constant is written, None that
            nothing else ever was (the stem, and a branch that is a constant already).
        kind: ``"attn_branch"`` or ``"mlp_branch"``; empty for the stem.
        norm: path of its norm; empty where there is none.
        post_norm: where that stands.
        gain: the tensor of its LayerScale, absorbed into weight and bias before a fold.
        drop: path of the module whose output is added to the stream (drop path).
    """

    name: str
    dim: Dim
    bias: tuple[str, ...]
    projection: str = ""
    inner: Dim | None = None
    kind: str = ""
    norm: str = ""
    post_norm: bool = False
    gain: str | None = None
    drop: str = ""

    @property
    def is_stem(self) -> bool:
        """Whether a stream begins here."""
        return not self.kind

    @property
    def projected_bias(self) -> str:
        """The bias of the projection: what a branch without units still puts out."""
        return f"{self.projection}.bias"

    @property
    def weight(self) -> str | None:
        """The matrix that produces the written value; None where a norm follows it."""
        return None if self.post_norm or not self.projection else f"{self.projection}.weight"

    @property
    def output(self) -> str:
        """The module whose output is what the branch writes, before its gain."""
        return self.norm if self.post_norm else self.name

    @property
    def scaling(self) -> str:
        """Path of the module that multiplies by the gain; empty where there is none.

        That of a gain that the block itself multiplies with is none: it does more.
        """
        holder = self.gain.rpartition(".")[0] if self.gain else ""
        return "" if self.name.startswith(f"{holder}.") else holder

    @property
    def helpers(self) -> tuple[str, ...]:
        """Paths of what is removed with the branch and lies outside: norm, gain, drop path.

        A gain is the module that multiplies by it, or a tensor of the block.
        """
        own = f"{self.name}."
        paths = (self.norm, self.scaling or self.gain, self.drop)
        return tuple(path for path in paths if path and not f"{path}.".startswith(own))


# rows of a bias: the tensor, and which of the parts of its only dimension
Rows = tuple[str, int]


@dataclass(frozen=True)
class Attention:
    """One softmax over tokens, with the temperature ``width ** -0.5`` of the dense model.

    Args:
        module: path of the module that has the temperature as ``.scale``.
        width: the dims of a query, where a path takes the temperature from their number or from
            ``.scale``; None where it is told apart from that, and so stays.
        queries: tensors whose first part along dimension 0 makes the queries, and makes up for
            another width.
        key_bias: moves all logits of a query alike; None where there is none, or a norm is behind.
        value_bias: reaches the output projection as it is; None where there is none, or a norm or
            a gate stands between.
    """

    module: str
    width: Dim | None
    queries: tuple[str, ...]
    key_bias: Rows | None = None
    value_bias: Rows | None = None


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one product: ``positions * prod(lengths of dims)``."""

    module: str
    positions: int
    dims: tuple[Dim, ...]


@dataclass
class Structure:
    """What can be removed from a model. Written by its family, read by everything else."""

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
    # path of every norm -> what its statistics run over
    norms: dict[str, Dim] = field(default_factory=dict)
    # axes stored at one common width: narrower sets are filled with zero rows
    boxes: list[tuple[Axis, ...]] = field(default_factory=list)
    # axes a norm reads across: zero filling would change its statistics
    unpaddable: set[str] = field(default_factory=set)
    attentions: list[Attention] = field(default_factory=list)
    stream: list[Write] = field(default_factory=list)
    # block path -> the branches it holds, in order
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # blocks with a branch that computes something, units or not; counted for every family alike
    depth: int = 0
    # branch axis -> the branch each of its units stands for
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    # axis -> where its units can be gated
    taps: dict[str, Place] = field(default_factory=dict)
    # axis of a residual stream, or of another width across which norms run -> where it is read, by
    # norms or as it is
    readers: dict[str, list[Place]] = field(default_factory=dict)

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

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All axes, those that keep the same units together, in model order.

        Tied parameters make axes alike, since they share their weights, or are stored at one width
        with axes that do.
        """
        together = {name: {name} for name in self.axes}
        for one, other in self._tied_axes():
            joined = together[one.name] | together[other.name]
            together |= dict.fromkeys(joined, joined)
        distinct = {id(names): names for names in together.values()}
        return tuple(
            Group(tuple(axis for name, axis in self.axes.items() if name in names))
            for names in distinct.values()
        )

    def _tied_axes(self) -> Iterator[tuple[Axis, Axis]]:
        """Pairs of different axes that have to keep the same units."""
        # what cannot be filled is as wide as its own units are many
        boxes = {a.name: box for box in self.boxes for a in box if a.name not in self.unpaddable}
        for name, first in self.ties.items():
            for a, b in zip(self.tensors[first], self.tensors[name], strict=True):
                for one, other in zip(a.axes, b.axes, strict=True):
                    own, others = boxes.get(one.name, (one,)), boxes.get(other.name, (other,))
                    for left, right in zip(own, others, strict=True):
                        if left != right:
                            yield left, right

    def writes(self) -> Iterator[Write]:
        """The branches of the residual streams, without the stems."""
        return (write for write in self.stream if write.inner is not None)

    def held(self, axis: Axis) -> list[tuple[str, ...]]:
        """The branches that each unit of a branch or block axis consists of; empty for others."""
        if axis.kind == "block":
            return list(self.blocks.values())
        return [(name,) for name in self.branches.get(axis.name, ())]

    def places(self, axis: Axis) -> tuple[Place, ...]:
        """Everything that reads units of an axis, the norms first: they stand before a Linear.

        Units are read by norms across the axis and by the inputs of Linear layers. The product of
        queries and keys is no module: where no Linear reads an axis, the outputs that make its
        units stand in for it.
        """
        norms = [Place(path, "norm", dim) for path, dim in self.norms.items() if axis in dim.axes]
        inputs, outputs = [], []
        for work in self.work:
            layout = self.tensors.get(f"{work.module}.weight", ())
            if len(layout) == 2:
                out, in_ = layout
                outputs += [Place(work.module, "output", out)] if axis in out.axes else []
                inputs += [Place(work.module, "input", in_)] if axis in in_.axes else []
        return (*norms, *(inputs or outputs))

    def axes_in(self, branches: Collection[str]) -> Iterator[Axis]:
        """The axes inside branches: an axis has the path of the module that holds its units."""
        prefixes = tuple(f"{branch}." for branch in branches)
        return (axis for axis in self.axes.values() if axis.name.startswith(prefixes))

    def owner(self, path: str) -> tuple[str, bool] | None:
        """The branch whose death takes a tensor or module with it, and whether it is in its core.

        The norm, LayerScale and drop path of a branch are not: they stay where a constant of
        the branch does. None for what belongs to no branch.
        """
        while path:
            if path in self._owners:
                return self._owners[path]
            path = path.rpartition(".")[0]
        return None

    @cached_property
    def _owners(self) -> dict[str, tuple[str, bool]]:
        owners = {path: (w.name, False) for w in self.writes() for path in w.helpers}
        return owners | {write.name: (write.name, True) for write in self.writes()}

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The names of every tensor that has several, in order."""
        names: dict[str, list[str]] = {}
        for name in self.tensors:
            if self.is_tied(name):
                names.setdefault(self.ties.get(name, name), []).append(name)
        return tuple(map(tuple, names.values()))

    @cached_property
    def param_terms(self) -> Terms:
        """The parameters, those that are not tied."""
        return Terms(
            self.axes,
            (
                (self.owner(name), 1, layout)
                for name, layout in self.tensors.items()
                if name not in self.buffers and not self.is_tied(name)
            ),
        )

    @cached_property
    def mac_terms(self) -> Terms:
        """The multiply-accumulates of one sample."""
        return Terms(self.axes, ((self.owner(w.module), w.positions, w.dims) for w in self.work))

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
