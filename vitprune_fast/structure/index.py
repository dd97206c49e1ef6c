"""What a plan means for a structure: stored widths, gather indices, what becomes of each branch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import numpy as np

from ..errors import InvalidInput
from .axes import Axis, Dim, Structure, Write

Fate = Literal["live", "removed", "folded", "constant"]


class Index:
    """The only interpreter of a Structure under a plan.

    Args:
        structure: the table of the model.
        kept: a plan checked against it, or any mapping from axis name to kept units.
        removed: branches that go with their constant output.
        fold: give the constant of an emptied branch to another writer, where one can take it.
    """

    def __init__(
        self,
        structure: Structure,
        kept: Mapping[str, list[int]],
        removed: frozenset[str] = frozenset(),
        *,
        fold: bool = True,
    ):
        self.structure = structure
        self.removed = removed
        self._fold = fold
        self._kept = {
            name: np.asarray(kept[name] if name in kept else range(axis.size), dtype=np.int64)
            for name, axis in structure.axes.items()
        }
        self.extent = {name: self._own_width(axis) for name, axis in structure.axes.items()}
        for box in structure.boxes:
            self._share_width(box)
        self._gathers: dict[Dim, np.ndarray] = {}

    def _counts(self, axis: Axis) -> np.ndarray:
        """Kept units of each kept parent (one number when there is no parent)."""
        if axis.parent is None:
            return np.array([len(self._kept[axis.name])])
        counts = np.bincount(self._kept[axis.name] // axis.width, minlength=axis.parent.size)
        return counts[self._kept[axis.parent.name]]

    def _own_width(self, axis: Axis) -> int:
        return int(self._counts(axis).max(initial=0))

    def _share_width(self, box: tuple[Axis, ...]) -> None:
        counts = {axis.name: self._counts(axis) for axis in box}
        # one stored row at least, or the softmax scale of an empty query would divide by zero
        width = max(1, *(int(c.max(initial=0)) for c in counts.values()))
        if not all(len(c) for c in counts.values()):
            # no head is left to store anything
            width = 0
        for axis in box:
            if (
                width
                and axis.name in self.structure.unpaddable
                and (counts[axis.name] != width).any()
            ):
                raise InvalidInput(
                    f"prune: units kept of {axis.name!r} must be {width} in every head, because a "
                    f"norm reads across them, got {sorted(set(counts[axis.name].tolist()))}"
                )
            self.extent[axis.name] = width

    def kept(self, axis: Axis) -> np.ndarray:
        """Kept unit numbers of an axis, int64, sorted."""
        return self._kept[axis.name]

    def length(self, dim: Dim) -> int:
        """Stored length of a dimension, fill rows included."""
        return dim.length(self.extent)

    def gather(self, dim: Dim) -> np.ndarray:
        """Old position of every new entry of a dimension, int64; -1 is a zero fill row."""
        if dim not in self._gathers:
            parts, base = [], 0
            for part in dim.parts:
                parts.append(self._gather_part(part, base))
                base += Dim((part,)).length()
            self._gathers[dim] = np.concatenate(parts)
        return self._gathers[dim]

    def kept_positions(self, dim: Dim) -> np.ndarray:
        """Old positions that stay, int64, without fill rows."""
        positions = self.gather(dim)
        return positions[positions >= 0]

    def _gather_part(self, part: tuple[Axis | int, ...], base: int) -> np.ndarray:
        """Mixed radix over the factors of a product, outermost first."""
        positions = np.array([base], dtype=np.int64)
        # for every position so far, which unit of each axis it lies in
        inside: dict[str, np.ndarray] = {}
        stride = Dim((part,)).length()
        for factor in part:
            if isinstance(factor, int):
                stride //= factor
                units = np.broadcast_to(np.arange(factor), (len(positions), factor))
            else:
                stride //= factor.width
                units = self._units(factor, inside, len(positions))
            lost = (positions[:, None] < 0) | (units < 0)
            positions = np.where(lost, -1, positions[:, None] + units * stride).ravel()
            inside = {name: np.repeat(u, units.shape[1]) for name, u in inside.items()}
            if isinstance(factor, Axis):
                inside[factor.name] = units.ravel()
        return positions

    def _units(self, axis: Axis, inside: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """(rows, stored width) unit numbers within the parent, -1 where filled."""
        width = self.extent[axis.name]
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

    def owners(self, dim: Dim, axis: Axis) -> np.ndarray:
        """Which unit of ``axis`` each old entry of the dimension belongs to, int64; -1 is none."""
        parts = []
        for part in dim.parts:
            sizes = [f if isinstance(f, int) else f.width for f in part]
            names = [f if isinstance(f, int) else f.name for f in part]
            total = int(np.prod(sizes))
            if axis.name not in names:
                parts.append(np.full(total, -1, dtype=np.int64))
                continue
            at = names.index(axis.name)
            digits = np.unravel_index(np.arange(total), sizes)
            unit = digits[at]
            if axis.parent is not None:
                unit = unit + digits[names.index(axis.parent.name)] * axis.width
            parts.append(unit)
        return np.concatenate(parts)

    @cached_property
    def dead(self) -> dict[str, Write]:
        """Branches that no longer compute anything, by name."""
        return {
            write.name: write
            for write in self.structure.writes()
            if write.name in self.removed
            or (write.inner is not None and not len(self.kept_positions(write.inner)))
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
        biases = (*write.bias, write.tail[0]) if write.tail else write.bias
        return not any(name in self.structure.tensors for name in biases)

    def _can_take(self, target: Write) -> bool:
        tied = any(map(self.structure.is_tied, (*target.bias, target.weight, target.gain)))
        present = all(name in self.structure.tensors for name in target.bias)
        return bool(target.bias) and present and not tied
