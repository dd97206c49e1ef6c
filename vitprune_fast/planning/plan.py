"""The plan: which units stay. Immutable, checked against a Structure, saved as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

from ..errors import DamagedFile, InvalidInput
from ..files import read_json, write_json
from ..structure.table import Structure

FORMAT = "vitprune_fast.plan"
VERSION = 1
# a plan lists its units, so a size out of a file must be one that memory can hold
MAX_SIZE = 1 << 20


class Plan(Mapping[str, list[int]]):
    """Kept units of every axis, in the numbering of the model it was made for.

    A mapping from axis name to the sorted list of kept unit numbers. ``removed`` names the branches
    that go with their bias; a branch whose units are merely all gone still writes its constant
    output, which pruning folds away.

    Plans are made by :func:`vitprune_fast.plan`, or by hand with :meth:`Plan.of`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        kept: Mapping[str, Sequence[int]],
        removed: Iterable[str] = (),
    ):
        self._sizes = dict(sizes)
        self._kept = {
            name: tuple(kept[name])
            for name, size in self._sizes.items()
            if name in kept and len(kept[name]) < size
        }
        self.removed = frozenset(removed)

    @classmethod
    def of(
        cls,
        structure: Structure,
        kept: Mapping[str, Sequence[int]] | None = None,
        removed: Iterable[str] = (),
    ) -> Plan:
        """A plan for ``structure`` that keeps ``kept`` of the axes named there and all of others.

        Args:
            structure: of the model to be pruned.
            kept: axis name -> sorted unit numbers to keep, without duplicates.
            removed: branches to remove, constant output included (``"blocks.3.attn"``). The same
                can be said through the axes ``attn_branches``, ``mlp_branches`` and ``blocks``.

        Raises:
            InvalidInput: an axis or branch the model does not have, or units that are not whole,
                sorted, unique and within the axis.
        """
        checked = {}
        for name, units in (kept or {}).items():
            if name not in structure.axes:
                raise InvalidInput(
                    f"Plan: kept must name axes of the model, got {name!r}; "
                    f"its axes are {_some(structure.axes)}"
                )
            checked[name] = _checked_units(name, units, structure.axes[name].size)
        kept, removed = _normalised(structure, checked, frozenset(removed))
        _check_groups(structure, kept, removed)
        return cls({name: axis.size for name, axis in structure.axes.items()}, kept, removed)

    def check(self, structure: Structure) -> Plan:
        """This plan, once it is known to fit ``structure``.

        Raises:
            InvalidInput: the plan was made for another model, or its units are not valid.
        """
        for name, axis in structure.axes.items():
            if self._sizes.get(name) != axis.size:
                raise InvalidInput(
                    f"Plan: plan must be made for this model, got one whose axis {name!r} has "
                    f"{self._sizes.get(name, 'no')} units instead of {axis.size}"
                )
        if foreign := sorted(self._sizes.keys() - structure.axes.keys()):
            raise InvalidInput(
                f"Plan: plan must be made for this model, got one with the axis {foreign[0]!r}, "
                "which the model does not have"
            )
        return Plan.of(structure, self._kept, self.removed)

    def __getitem__(self, axis: str) -> list[int]:
        if axis not in self._sizes:
            raise KeyError(axis)
        return list(self._kept.get(axis, range(self._sizes[axis])))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (self._sizes, self._kept, self.removed) == (
            other._sizes,
            other._kept,
            other.removed,
        )

    def __hash__(self) -> int:
        return hash((tuple(sorted(self._kept.items())), self.removed))

    def __repr__(self) -> str:
        cut = ", ".join(
            f"{name} {len(units)}/{self._sizes[name]}" for name, units in self._kept.items()
        )
        return f"Plan({cut or 'keeps everything'})"

    @property
    def keeps_everything(self) -> bool:
        """Whether no unit goes."""
        return not self._kept and not self.removed

    def size(self, axis: str) -> int:
        """How many units the axis has before pruning."""
        return self._sizes[axis]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values: sizes of all axes, kept units of those that lose some, branches removed."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "sizes": self._sizes,
            "kept": {name: list(units) for name, units in self._kept.items()},
            "removed": sorted(self.removed),
        }

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            DamagedFile: the file is not a plan, or its values are not possible.
        """
        data = read_json(Path(path))
        try:
            return cls.from_json(data)
        except (InvalidInput, KeyError, TypeError, AttributeError) as error:
            # the file may have put a megabyte of itself into the message
            raise DamagedFile(f"Plan.load: {path} must be a plan, got {error!s:.500}") from None

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan of :meth:`to_json`.

        Raises:
            InvalidInput: values that are not possible; of other types it is a ``TypeError`` or
                ``KeyError``.
        """
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise InvalidInput(f"format {data['format']!r} version {data['version']!r}")
        sizes = {str(name): size for name, size in data["sizes"].items()}
        counts = range(MAX_SIZE + 1)
        if bad := [n for n, size in sizes.items() if type(size) is not int or size not in counts]:
            raise InvalidInput(f"a size of {bad[0]!r} that is no count up to {MAX_SIZE}")
        kept = {}
        for name, units in data["kept"].items():
            if name not in sizes:
                raise InvalidInput(f"units of {name!r}, an axis without a size")
            kept[name] = _checked_units(name, units, sizes[name])
        removed = data["removed"]
        if not isinstance(removed, list) or not all(isinstance(r, str) for r in removed):
            raise InvalidInput("removed branches that are not names")
        return cls(sizes, kept, removed)


def _checked_units(axis: str, units: Sequence[int], size: int) -> tuple[int, ...]:
    if not isinstance(units, Sequence) or isinstance(units, (str, bytes)):
        raise InvalidInput(f"Plan: kept units of {axis!r} must be a list of numbers, got {units!r}")
    if len(units) > size:
        raise InvalidInput(f"Plan: kept units of {axis!r} must be at most {size}, got {len(units)}")
    for unit in units:
        # a plan has tens of thousands, and an abstract class takes long to ask
        is_whole = type(unit) is int or (isinstance(unit, Integral) and not isinstance(unit, bool))
        if not is_whole:
            raise InvalidInput(f"Plan: kept units of {axis!r} must be whole numbers, got {unit!r}")
    values = tuple(int(unit) for unit in units)
    if any(b <= a for a, b in pairwise(values)):
        raise InvalidInput(
            f"Plan: kept units of {axis!r} must be sorted without duplicates, got {_some(values)}"
        )
    if values and not 0 <= values[0] <= values[-1] < size:
        raise InvalidInput(
            f"Plan: kept units of {axis!r} must lie in 0..{size - 1}, "
            f"got {values[0] if values[0] < 0 else values[-1]}"
        )
    return values


def _normalised(
    s: Structure, kept: dict[str, tuple[int, ...]], removed: frozenset[str]
) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """One way to say each thing: branch axes and ``removed`` agree, losses reach the children."""
    branches = {write.name: write for write in s.writes()}
    if foreign := sorted(removed - branches.keys()):
        raise InvalidInput(
            f"Plan: removed must name branches of the model, got {foreign[0]!r}; "
            f"its branches are {_some(branches)}"
        )
    gone = set(removed)
    for axis, paths in s.branches.items():
        if axis in kept:
            gone |= {path for u, path in enumerate(paths) if u not in set(kept[axis])}
    for u, held in enumerate(s.blocks.values()):
        if "blocks" in kept and u not in kept["blocks"]:
            gone |= set(held)
    for axis, paths in s.branches.items():
        kept[axis] = tuple(u for u, path in enumerate(paths) if path not in gone)
    if s.blocks:
        kept["blocks"] = tuple(u for u, held in enumerate(s.blocks.values()) if set(held) - gone)
    emptied = {axis.name for axis in s.axes_in(gone)}
    for name, axis in s.axes.items():
        if name in emptied:
            kept[name] = ()
        elif axis.parent is not None and axis.parent.name in kept:
            parents = set(kept[axis.parent.name])
            units = kept.get(name, range(axis.size))
            kept[name] = tuple(u for u in units if u // axis.width in parents)
    return kept, frozenset(gone)


def _check_groups(
    s: Structure, kept: Mapping[str, tuple[int, ...]], removed: frozenset[str]
) -> None:
    """The axes of a group keep the same units, unless their branch goes altogether."""
    gone = {axis.name for axis in s.axes_in(removed)}
    for group in s.groups:
        staying = [axis for axis in group.axes if axis.name not in gone]
        for first, other in pairwise(staying):
            everything = tuple(range(first.size))
            if kept.get(other.name, everything) != kept.get(first.name, everything):
                raise InvalidInput(
                    f"Plan: kept units of {other.name!r} must be those of {first.name!r}, since "
                    "they share parameters, or a width with axes that do, got others; keep the "
                    "same units or untie the parameters"
                )


def _some(values: Iterable[Any], count: int = 4) -> str:
    shown = [str(v) for v in values]
    return ", ".join(shown[:count]) + (", ..." if len(shown) > count else "")
