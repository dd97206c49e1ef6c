"""What a choice of units means for a structure: widths, gather indices, fates of branches, cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from .axes import Axis, Dim
from .table import Structure, Write
from .terms import Home

Fate = Literal["live", "removed", "folded", "constant"]


class Reading:
    """The only interpreter of a Structure: what is left of a model.

    Made of a plan, of bare counts (:meth:`of_counts`), or of how open the gates of units are
    (:meth:`of_openness`). Widths and costs of counts are those of any plan with these counts, and
    cost no list of units; under gates they are tensors, and differentiable.

    Args:
        structure: the table of the model.
        kept: a plan checked against it, or any mapping from axis name to sorted unit numbers; axes
            not named keep all. ``kept.removed``, where it has such an attribute, names branches
            that go with their constant output.
        fold: give the constant of an emptied branch to another writer, where one can take it.

    Attributes:
        extent: axis name -> stored width: of all units, or of those of each parent unit.
        removed: branches that go with their constant output.

    Raises:
        InvalidInput: zeros would have to fill dims that a norm reads across.
    """

    def __init__(
        self,
        structure: Structure,
        kept: Mapping[str, Sequence[int]] | None = None,
        *,
        fold: bool = True,
    ):
        removed = getattr(kept, "removed", frozenset())
        self._begin(structure, _Sets(structure, kept or {}), removed, fold=fold)

    @classmethod
    def of_counts(
        cls,
        structure: Structure,
        counts: Mapping[str, int],
        removed: Collection[str] = (),
        *,
        fold: bool = True,
    ) -> Reading:
        """As if the first so many units of every axis were kept.

        Args:
            structure: as above.
            counts: axis name -> how many units stay; of dims of heads, how many in each head. Axes
                not named keep all; branches and blocks are named in ``removed``.
            removed: branches that go with their constant output.
            fold: as above.

        Raises:
            InvalidInput: a count is out of range, of no axis that can be counted, or another one
                than that of an axis with the same parameters.
        """
        for name, count in counts.items():
            axis = structure.axes.get(name)
            whole = isinstance(count, Integral) and not isinstance(count, bool)
            most = None if axis is None or structure.held(axis) else axis.width
            if most is None or not whole or not 0 <= count <= most:
                raise InvalidInput(
                    "predict_cost: counts must be whole numbers of units of the model, from 0 to "
                    f"all, got {count!r} of {name!r}, which has {most or 'no'} units; a plan says "
                    "which branches and blocks go"
                )
        gone = {axis.name for axis in structure.axes_in(removed)} if removed else ()
        for group in (each for each in structure.groups if len(each.axes) > 1):
            staying = [axis for axis in group.axes if axis.name not in gone]
            if len({counts.get(axis.name, axis.width) for axis in staying}) > 1:
                raise InvalidInput(
                    f"predict_cost: counts of {staying[0].name!r} and {staying[1].name!r} must be "
                    "the same, since they share parameters, got others"
                )
        reading = cls.__new__(cls)
        reading._begin(structure, _Counts(counts), frozenset(removed), fold=fold)
        return reading

    @classmethod
    def of_openness(cls, structure: Structure, openness: Mapping[str, Tensor]) -> Reading:
        """Under gates: a unit counts as much as its gate is open.

        Args:
            structure: as above.
            openness: axis name -> (units,) in [0, 1], fp64; axes not named count whole.
        """
        reading = cls.__new__(cls)
        reading._begin(structure, _Openness(openness), frozenset(), fold=True)
        return reading

    def _begin(
        self, structure: Structure, units: _Units, removed: frozenset[str], *, fold: bool
    ) -> None:
        self.structure, self.removed = structure, removed
        self._units, self._fold = units, fold
        self.extent: dict[str, Any] = {
            axis.name: units.total(axis) if axis.parent is None else units.widest(axis)
            for axis in structure.axes.values()
        }
        for box in structure.boxes:
            self._share_width(box)
        self._gathers: dict[Dim, np.ndarray] = {}

    def _share_width(self, box: tuple[Axis, ...]) -> None:
        width = self._units.shared([self.extent[axis.name] for axis in box])
        self.extent |= {axis.name: width for axis in box}
        for axis in box:
            if axis.name not in self.structure.unpaddable or not self._units.exact:
                continue
            # of a branch that goes nothing is stored
            if not self._units.fills(axis, width) and axis not in self.structure.axes_in(self.dead):
                counts = self._units.of_kept_parents(axis)
                raise InvalidInput(
                    f"prune: units kept of {axis.name!r} must be {width} in every head, "
                    f"because a norm reads across them, got {sorted(set(counts.tolist()))}"
                )

    def kept(self, axis: Axis) -> np.ndarray:
        """Kept unit numbers of an axis, int64, sorted."""
        return self._units.kept(axis)

    def length(self, dim: Dim) -> int:
        """Stored length of a dimension, fill rows included."""
        return dim.length(self.extent)

    def useful(self, dim: Dim) -> Any:
        """Entries of a dimension that hold kept units alone, without fill rows."""
        total: Any = 0
        for part in dim.parts:
            count: Any = math.prod(factor for factor in part if isinstance(factor, int))
            axes = [factor for factor in part if isinstance(factor, Axis)]
            for axis in (axis for axis in axes if axis.parent is None):
                inside = [each for each in axes if each.parent == axis]
                units = self._units
                count = count * (units.inside(axis, inside) if inside else units.total(axis))
            total = total + count
        return total

    def gather(self, dim: Dim) -> np.ndarray:
        """Old position of every new entry of a dimension, int64; -1 is a zero fill row."""
        if dim not in self._gathers:
            parts, base = [], 0
            for number in range(len(dim.parts)):
                part = dim.part(number)
                parts.append(self._gather_part(part, base))
                base += part.length()
            self._gathers[dim] = np.concatenate(parts)
        return self._gathers[dim]

    def kept_positions(self, dim: Dim) -> np.ndarray:
        """Old positions that stay, int64, without fill rows."""
        positions = self.gather(dim)
        return positions[positions >= 0]

    def _gather_part(self, product: Dim, base: int) -> np.ndarray:
        """Mixed radix over the factors of a product, outermost first."""
        positions = np.array([base], dtype=np.int64)
        # for every position so far, which unit of each axis it lies in
        inside: dict[str, np.ndarray] = {}
        stride = product.length()
        if not stride:
            return positions[:0]
        for factor in product.parts[0]:
            if isinstance(factor, int):
                stride //= factor
                units = np.broadcast_to(np.arange(factor), (len(positions), factor))
            else:
                stride //= factor.width
                units = self._rows(factor, inside, len(positions))
            lost = (positions[:, None] < 0) | (units < 0)
            positions = np.where(lost, -1, positions[:, None] + units * stride).ravel()
            inside = {name: np.repeat(u, units.shape[1]) for name, u in inside.items()}
            if isinstance(factor, Axis):
                inside[factor.name] = units.ravel()
        return positions

    def _rows(self, axis: Axis, inside: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """(rows, stored width) unit numbers within the parent, -1 where filled."""
        width = int(self.extent[axis.name])
        if axis.parent is None:
            row = np.full(width, -1, dtype=np.int64)
            units = self.kept(axis)[:width]
            row[: len(units)] = units
            return np.broadcast_to(row, (rows, width))
        table = np.full((axis.parent.size + 1, width), -1, dtype=np.int64)
        parents, units = np.divmod(self.kept(axis), axis.width)
        first = np.searchsorted(parents, parents)
        table[parents, np.arange(len(parents)) - first] = units
        # a filled parent (-1) reads the last row, which is all fill
        return table[inside[axis.parent.name]]

    @cached_property
    def dead(self) -> dict[str, Write]:
        """Branches that no longer compute anything, by name."""
        return {
            write.name: write
            for write in self.structure.writes()
            if write.name in self.removed
            or (write.inner is not None and not self.useful(write.inner))
        }

    @cached_property
    def fates(self) -> dict[str, tuple[Fate, Write | None]]:
        """What becomes of every branch, and the writer that takes over a folded constant.

        A constant goes backwards, into the last live writer before it: no reader lies between.
        """
        fates: dict[str, tuple[Fate, Write | None]] = {}
        target = None
        for write in self.structure.stream:
            if write.name not in self.dead:
                target = write
                fates[write.name] = ("live", None)
            elif write.name in self.removed or self._is_silent(write):
                fates[write.name] = ("removed", None)
            elif self._fold and target is not None and self._can_take(target):
                fates[write.name] = ("folded", target)
            else:
                # it still writes, so constants after it cannot pass it
                target = None
                fates[write.name] = ("constant", None)
        return fates

    def _is_silent(self, write: Write) -> bool:
        """An empty branch without any bias writes zeros."""
        biases = (*write.bias, write.projected_bias)
        return not any(name in self.structure.tensors for name in biases)

    def _can_take(self, target: Write) -> bool:
        tied = any(map(self.structure.is_tied, (*target.bias, target.weight, target.gain)))
        present = all(name in self.structure.tensors for name in target.bias)
        return bool(target.bias) and present and not tied

    @cached_property
    def gone(self) -> frozenset[Home]:
        """What pruning removes: cores of dead branches, their norms, LayerScales, drop paths."""
        cores = {(name, True) for name in self.dead}
        # a constant that no writer can take over keeps its norm, LayerScale and drop path
        helpers = {(name, False) for name in self.dead if self.fates[name][0] != "constant"}
        return frozenset(cores | helpers)

    def is_gone(self, path: str) -> bool:
        """Whether a tensor or module is taken out with its branch."""
        return bool(self.dead) and self.structure.owner(path) in self.gone

    @property
    def params(self) -> int:
        """Parameters that are left, tied ones once, constants of emptied branches included."""
        constants = (w.dim for name, w in self.dead.items() if self.fates[name][0] == "constant")
        return (
            self.structure.param_terms.total(self._widths, self.gone)
            + sum(map(self._size, self._tied_layouts()))
            + sum(map(self.length, constants))
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates that are left, of one sample."""
        return self.structure.mac_terms.total(self._widths, self.gone)

    @property
    def useful_macs(self) -> int:
        """The same without the zero rows that fill what is stored at one width."""
        boxed = (axis for box in self.structure.boxes for axis in box)
        if all(self._units.fills(axis, self.extent[axis.name]) for axis in boxed):
            return self.macs
        left = (work for work in self.structure.work if not self.is_gone(work.module))
        return int(sum(work.positions * math.prod(map(self.useful, work.dims)) for work in left))

    @cached_property
    def _widths(self) -> np.ndarray:
        return np.array([*self.extent.values(), 1], dtype=np.int64)

    def _size(self, layout: tuple[Dim, ...]) -> int:
        return math.prod(map(self.length, layout))

    def _tied_layouts(self) -> Iterator[tuple[Dim, ...]]:
        """The layout of every tied parameter under one of its names that are left."""
        tensors, buffers = self.structure.tensors, self.structure.buffers
        for names in self.structure.tied:
            left = [name for name in names if name not in buffers and not self.is_gone(name)]
            if left:
                yield tensors[left[-1]]


class _Units(ABC):
    """Which units are kept, or how many of them."""

    # whether the numbers are whole
    exact = True

    @abstractmethod
    def total(self, axis: Axis) -> Any:
        """How many units of an axis without parent."""

    @abstractmethod
    def each(self, axis: Axis) -> Any:
        """(parents,): how many units of every parent unit; 0 of those that are lost."""

    @abstractmethod
    def kept(self, axis: Axis) -> np.ndarray:
        """Unit numbers, int64, sorted."""

    def widest(self, axis: Axis) -> Any:
        """The most that a parent unit keeps."""
        return int(self.each(axis).max(initial=0))

    def shared(self, widths: Sequence[Any]) -> Any:
        """The one width of axes that are stored alike."""
        # one stored row at least, or the softmax scale of an empty query would divide by zero
        return max(1, *widths)

    def inside(self, parent: Axis, axes: Sequence[Axis]) -> Any:
        """Over all parent units, the sum of the products of how many units each has of the axes."""
        products: Any = math.prod(map(self.each, axes))
        return products.sum()

    def of_kept_parents(self, axis: Axis) -> Any:
        """(kept parents,) as ``each``, or (1,) without parent."""
        if axis.parent is None:
            return np.array([self.total(axis)])
        return self.each(axis)[self.kept(axis.parent)]

    def fills(self, axis: Axis, width: Any) -> bool:
        """Whether every kept parent unit keeps so many units, so that nothing is filled up."""
        return bool((self.of_kept_parents(axis) == width).all())


class _Sets(_Units):
    """Units by their numbers."""

    def __init__(self, structure: Structure, kept: Mapping[str, Sequence[int]]):
        self._kept = {
            name: np.asarray(kept[name] if name in kept else range(axis.size), dtype=np.int64)
            for name, axis in structure.axes.items()
        }

    def kept(self, axis: Axis) -> np.ndarray:
        return self._kept[axis.name]

    def total(self, axis: Axis) -> int:
        return len(self._kept[axis.name])

    def each(self, axis: Axis) -> np.ndarray:
        assert axis.parent is not None
        counts = np.bincount(self._kept[axis.name] // axis.width, minlength=axis.parent.size)
        kept = np.zeros_like(counts)
        parents = self._kept[axis.parent.name]
        kept[parents] = counts[parents]
        return kept


class _Counts(_Units):
    """The first so many units of every axis, or of every parent unit; in numbers, not arrays."""

    def __init__(self, counts: Mapping[str, int]):
        self._counts = counts

    def total(self, axis: Axis) -> int:
        return self._counts.get(axis.name, axis.width)

    def kept(self, axis: Axis) -> np.ndarray:
        units = np.arange(self.total(axis))
        if axis.parent is None:
            return units
        return (np.arange(self.total(axis.parent))[:, None] * axis.width + units).ravel()

    def each(self, axis: Axis) -> np.ndarray:
        assert axis.parent is not None
        kept = np.zeros(axis.parent.size, dtype=np.int64)
        kept[: self.total(axis.parent)] = self.total(axis)
        return kept

    def widest(self, axis: Axis) -> int:
        assert axis.parent is not None
        return self.total(axis) if self.total(axis.parent) else 0

    def inside(self, parent: Axis, axes: Sequence[Axis]) -> int:
        return self.total(parent) * math.prod(map(self.total, axes))

    def fills(self, axis: Axis, width: int) -> bool:
        is_lost = axis.parent is not None and not self.total(axis.parent)
        return is_lost or self.total(axis) == width


class _Openness(_Units):
    """Units that count as much as their gates are open."""

    exact = False

    def __init__(self, openness: Mapping[str, Tensor]):
        self._openness = openness
        self._like = next(iter(openness.values()))

    def _open(self, axis: Axis) -> Tensor:
        known = self._openness.get(axis.name)
        return self._like.new_ones(axis.size) if known is None else known

    def kept(self, axis: Axis) -> np.ndarray:
        return (self._open(axis) > 0).nonzero().flatten().cpu().numpy()

    def total(self, axis: Axis) -> Any:
        known = self._openness.get(axis.name)
        return axis.size if known is None else known.sum()

    def each(self, axis: Axis) -> Tensor:
        assert axis.parent is not None
        counts = self._open(axis).view(axis.parent.size, axis.width).sum(1)
        parent = self._openness.get(axis.parent.name)
        return counts if parent is None else counts.where(parent > 0, 0.0)

    def widest(self, axis: Axis) -> Any:
        return self.each(axis).amax() if axis.name in self._openness else axis.width

    def shared(self, widths: Sequence[Any]) -> Any:
        if not any(isinstance(width, Tensor) for width in widths):
            return super().shared(widths)
        wide = [torch.as_tensor(width).to(self._like) for width in widths]
        return torch.stack(wide).amax().clamp(min=1)

    def of_kept_parents(self, axis: Axis) -> Tensor:
        return self._open(axis).sum().view(1) if axis.parent is None else self.each(axis)
