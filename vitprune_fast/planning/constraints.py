"""Which units may go at all, and how many of each axis have to stay."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..structure import DEPTH_KINDS, UNIT_KINDS, Axis, Group, Structure
from .budget import NUMBER, WHOLE
from .problem import Ladder, ordered

PerKind = int | Mapping[str, int]
Bounds = Mapping[str, Sequence[float | int | None]]
# what GPUs want in 16 bits (ADR 15): rows of 16 bytes, in axes in which such steps are fine enough
_ALIGNED_UNITS = 8
_ALIGNED_ABOVE = {"neuron": 256, "embed": 256, "qk_dim": 31, "v_dim": 31}


@dataclass(frozen=True)
class Constraints:
    """What a plan may not do; see the arguments of ``plan`` of the same names."""

    units: Collection[str] = ("head", "neuron")
    min_units: PerKind = 1
    round_to: PerKind | None = None
    bounds: Bounds = field(default_factory=dict)
    protect: Sequence[str] = ()
    include: Sequence[str] | None = None
    keep_ends: bool = True

    def __post_init__(self) -> None:
        if (
            isinstance(self.units, str)
            or not self.units
            or any(kind not in UNIT_KINDS for kind in self.units)
        ):
            raise InvalidInput(
                f"plan: units must be a list of kinds among {', '.join(UNIT_KINDS)}, "
                f"got {self.units!r}"
            )
        for name, least in (("min_units", 0), ("round_to", 1)):
            _check_per_kind(name, getattr(self, name), least)
        for name in ("protect", "include"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns or ()):
                raise InvalidInput(f"plan: {name} must be a list of patterns, got {patterns!r}")
        if not isinstance(self.bounds, Mapping) or not all(isinstance(k, str) for k in self.bounds):
            raise InvalidInput(
                "plan: bounds must map unit kinds or patterns to (least, most), got "
                f"{self.bounds!r}"
            )
        for key, pair in self.bounds.items():
            _check_bound(key, pair)

    @classmethod
    def among(cls, options: Mapping[str, Any]) -> Constraints:
        """Those among the arguments of ``plan``; None is the default."""
        names = {each.name for each in fields(cls)}
        return cls(**{k: v for k, v in options.items() if k in names and v is not None})

    def check(self, structure: Structure) -> None:
        """Refuse, before there are scores, what the ladders of a model would be refused for."""
        flat = {group.first.name: np.zeros(group.first.size) for group in structure.groups}
        self.ladders(structure, flat)

    def ladders(self, structure: Structure, rankings: Mapping[str, np.ndarray]) -> list[Ladder]:
        """The ladders of all groups of axes of which units may go, in model order.

        Args:
            structure: of the model.
            rankings: of every scored group, by the name of its first axis: (units,), larger stays.

        Raises:
            InvalidInput: a pattern matches nothing, or constraints contradict each other.
        """
        for name, patterns in (("protect", self.protect), ("include", self.include or ())):
            for pattern in patterns:
                if not any(fnmatchcase(each, pattern) for each in _all_names(structure)):
                    raise _matches_nothing(name, pattern, structure)
        found, homes = [], _homes(structure)
        fixed = _one_of_each_stage(structure, rankings)
        if self.keep_ends and structure.blocks:
            blocks = [*structure.blocks.values()]
            fixed |= {*blocks[0], *blocks[-1]}
        for group in structure.groups:
            ranking = rankings.get(group.first.name)
            if ranking is None or group.first.kind not in self.units:
                continue
            if structure.held(group.first):
                ladder = self._of_branches(structure, group, ranking, homes, fixed)
            else:
                ladder = self._of_units(group, ranking, homes)
            found += [] if ladder is None else [ladder]
        if not found:
            raise InvalidInput(
                "plan: protect, include and keep_ends must leave units to cut, got none of "
                f"{', '.join(self.units)} that may go"
            )
        for key in self.bounds:
            if not any(_is_bound(key, axis) for ladder in found for axis in ladder.group.axes):
                raise InvalidInput(
                    f"plan: bounds must be of axes that are cut, got {key!r}, which matches none "
                    f"of {_some(ladder.axis.name for ladder in found)}"
                )
        return found

    def _of_units(self, group: Group, ranking: np.ndarray, homes: Homes) -> Ladder | None:
        names = [name for axis in group.names for name in (axis, *homes.get(axis, ()))]
        if _any_matches(names, self.protect) or not self._includes(names):
            return None
        rows = group.first.parent.size if group.first.parent else 1
        order = ordered(ranking, rows)
        # without q/k dims one row of zeros would be stored all the same
        # and no model runs without channels
        fixed = 1 if group.first.kind in ("qk_dim", "embed") else 0
        return Ladder(group, order, ranking[order].sum(0), self._rungs(group, fixed))

    def _of_branches(
        self,
        structure: Structure,
        group: Group,
        ranking: np.ndarray,
        homes: Homes,
        fixed: set[str],
    ) -> Ladder | None:
        """Of branches or blocks; those that hold one of the ``fixed`` branches stay."""
        axis = group.first
        held = structure.held(axis)
        paths = [*structure.blocks] if axis.kind == "block" else [name for (name,) in held]
        stays = np.zeros(axis.size, dtype=bool)
        for unit, (path, branches) in enumerate(zip(paths, held, strict=True)):
            above = (path, *homes.get(path, ()))
            inside = (*branches, *(each.name for each in structure.axes_in(branches)))
            stays[unit] = (
                not fixed.isdisjoint(branches)
                or _any_matches((*above, *inside, axis.name), self.protect)
                or not self._includes((*above, axis.name))
            )
        if stays.all():
            return None
        # what stays stands behind all that may go
        order = ordered(ranking)[0]
        order = order[np.argsort(stays[order], kind="stable")]
        rungs = self._rungs(group, int(stays.sum()))
        return Ladder(group, order[None], ranking[order], rungs, held)

    def _includes(self, names: Iterable[str]) -> bool:
        return self.include is None or _any_matches(names, self.include)

    def _rungs(self, group: Group, fixed: int) -> tuple[int, ...]:
        """How many units, or units of each parent, may stay; so many have to."""
        axis = group.first
        least, most = max(fixed, _per_kind(self.min_units, axis, 1)), axis.width
        step = _multiple(self.round_to, axis)
        for key, (low, high) in self.bounds.items():
            if any(_is_bound(key, each) for each in group.axes):
                least = max(least, _units(low, axis.width, math.ceil, 0))
                most = min(most, _units(high, axis.width, math.floor, axis.width))
        least = min(axis.width, math.ceil(least / step) * step)
        below = range(axis.width // step * step, -1, -step)
        rungs = [n for n in (axis.width, *below) if least <= n <= most]
        if not rungs:
            raise InvalidInput(
                f"plan: bounds must leave {axis.name!r} a number of units, got at least {least} "
                f"and at most {most} in steps of {step}"
            )
        return tuple(dict.fromkeys(rungs))

    def relaxed(self) -> Iterator[tuple[str, Constraints]]:
        """Each constraint besides the unit kinds, and what is left without it."""
        for name, lax in (
            ("min_units", 0),
            ("round_to", 1),
            ("bounds", {}),
            ("protect", ()),
            ("include", None),
            ("keep_ends", False),
        ):
            yield name, replace(self, **{name: lax})


def _check_per_kind(argument: str, value: Any, least: int) -> None:
    if isinstance(value, Mapping) and (unknown := value.keys() - {*UNIT_KINDS}):
        raise InvalidInput(
            f"plan: {argument} must name kinds among {', '.join(UNIT_KINDS)}, got {min(unknown)!r}"
        )
    numbers = [*value.values()] if isinstance(value, Mapping) else [value]
    for number in [] if value is None else numbers:
        if isinstance(number, bool) or not isinstance(number, WHOLE) or number < least:
            raise InvalidInput(
                f"plan: {argument} must be a whole number >= {least}, got {number!r}"
            )


def _check_bound(key: str, pair: Any) -> None:
    """A pair of shares or numbers, either of which may be None."""
    known = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    ends = [end for end in pair if end is not None] if known else []
    if not known or any(not _is_end(end) for end in ends):
        raise InvalidInput(
            f"plan: bounds of {key!r} must be (least, most) in units, or as shares between 0.0 and "
            f"1.0, got {pair!r}"
        )


def _is_end(end: Any) -> bool:
    if isinstance(end, bool) or not isinstance(end, NUMBER):
        return False
    return bool(end >= 0 and (isinstance(end, WHOLE) or end <= 1))


def _units(end: float | int | None, width: int, rounded: Any, default: int) -> int:
    """One end of bounds in units; shares are rounded inwards."""
    if end is None:
        return default
    # a share such as .3 of 10 is no more than 3, whatever its product rounds to
    return int(end) if isinstance(end, WHOLE) else rounded(round(float(end) * width, 9))


def _is_bound(key: str, axis: Axis) -> bool:
    return axis.kind == key if key in UNIT_KINDS else fnmatchcase(axis.name, key)


def _per_kind(value: PerKind | None, axis: Axis, default: int) -> int:
    if isinstance(value, Mapping):
        return value.get(axis.kind, default)
    return default if value is None else value


def _multiple(value: PerKind | None, axis: Axis) -> int:
    """Steps of an axis; one number for all kinds is not meant for branches and blocks."""
    is_deep = axis.kind in DEPTH_KINDS and not isinstance(value, Mapping)
    return 1 if is_deep else _per_kind(value, axis, _aligned(axis))


def has_stages(structure: Structure) -> bool:
    """Whether blocks lie in several containers, none of which may be empty."""
    return len({path.rpartition(".")[0] for path in structure.blocks}) > 1


def _aligned(axis: Axis) -> int:
    is_large = axis.width > _ALIGNED_ABOVE.get(axis.kind, axis.width)
    return _ALIGNED_UNITS if is_large and axis.width % _ALIGNED_UNITS == 0 else 1


def _any_matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    patterns = tuple(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _all_names(structure: Structure) -> list[str]:
    """What patterns may match."""
    return [*structure.axes, *structure.blocks, *(write.name for write in structure.writes())]


# axis or branch -> paths of what holds it, the block last
Homes = Mapping[str, tuple[str, ...]]


def _homes(structure: Structure) -> Homes:
    blocks = {name: path for path, held in structure.blocks.items() for name in held}
    # one that lost its other branch is no unit of blocks any more
    homes: dict[str, tuple[str, ...]] = {
        write.name: (blocks.get(write.name, write.name.rpartition(".")[0]),)
        for write in structure.writes()
    }
    for name in structure.axes:
        if (owner := structure.owner(name)) and owner[0] in homes:
            homes[name] = (owner[0], *homes[owner[0]])
    return homes


def _one_of_each_stage(structure: Structure, rankings: Mapping[str, np.ndarray]) -> set[str]:
    """The branches of the best block of every stage, of a model with several: none may be empty.

    A block is worth its score, or those of its branches.
    """
    if not has_stages(structure):
        return set()
    worth = dict.fromkeys(structure.blocks, 0.0)
    for name, ranking in rankings.items():
        axis = structure.axes[name]
        units = structure.held(axis) if axis.kind == "block" or "blocks" not in rankings else ()
        for score, branches in zip(ranking.tolist(), units, strict=False):
            for path, own in structure.blocks.items():
                worth[path] += score * ({*branches} <= {*own})
    stages: dict[str, list[str]] = {}
    for path in structure.blocks:
        stages.setdefault(path.rpartition(".")[0], []).append(path)
    best = [max(paths, key=worth.__getitem__) for paths in stages.values()]
    return {name for path in best for name in structure.blocks[path]}


def _matches_nothing(argument: str, pattern: str, structure: Structure) -> InvalidInput:
    return InvalidInput(
        f"plan: {argument} must match axes, branches or blocks of the model, got {pattern!r}, "
        f"which matches none; there are {_some(_all_names(structure))}"
    )


def _some(names: Iterable[str], count: int = 4) -> str:
    shown = [*names]
    return ", ".join(shown[:count]) + (", ..." if len(shown) > count else "")
