"""Find what a table lacks where plans break: try additional declarations one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

from torch import nn

from ..planning.plan import Plan
from ..structure import Axis, Dim, Structure
from ..structure.axes import as_dim
from ..structure.reading import Reading
from ..structure.table import Attention
from .declared import written
from .subject import Cut, Subject

# a dimension of more parts has too many orders
_MOST_PARTS = 4
_SHOWN = 8


def explained(subject: Subject, plan: Plan, cuts: Sequence[Cut]) -> str:
    """The likely fault where a plan breaks: a declaration whose change repairs it."""
    structure = subject.structure
    axes = [cut for cut in cuts if not isinstance(cut, str)]
    folds = [
        f"the constant of {name} is folded into {target.name} by {', '.join(target.bias)}"
        for name, (fate, target) in Reading(structure, plan).fates.items()
        if fate == "folded" and target is not None
    ]
    if folds and subject.broken(plan, fold=False) is None:
        return f"{folds[0]}; nothing differs where it stays in its own place"
    for said, repaired in _repairs(subject, axes):
        if subject.broken(plan, repaired) is None:
            return said
    over = [
        name
        for name, layout in structure.tensors.items()
        if any(axis in dim.axes for axis in axes for dim in layout)
    ]
    more = f" and {len(over) - _SHOWN} more" if len(over) > _SHOWN else ""
    return f"over it run {', '.join(over[:_SHOWN])}{more}" if over else ""


def _repairs(subject: Subject, axes: Sequence[Axis]) -> Iterator[tuple[str, Structure]]:
    yield from _attributes(subject, axes)
    yield from _boxes(subject.structure, axes)
    yield from _queries(subject.structure, axes)
    yield from _orders(subject.structure, axes)


def _attributes(subject: Subject, axes: Sequence[Axis]) -> Iterator[tuple[str, Structure]]:
    """Sizes that a module around the units repeats, and that the table does not know of."""
    structure = subject.structure
    dims = {
        dim.length(): dim
        for layout in structure.tensors.values()
        for dim in layout
        if any(axis in dim.axes for axis in axes)
    }
    dims |= {axis.width: as_dim(axis) for axis in axes}
    around = {
        name.rsplit(".", depth)[0]
        for name, layout in structure.tensors.items()
        for depth in range(1, name.count(".") + 1)
        if any(axis in dim.axes for axis in axes for dim in layout)
    }
    for path, module in subject.model.named_modules():
        if path and path not in around:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) or hasattr(module, "normalized_shape"):
            # these follow their weight
            continue
        for name, value in vars(module).items():
            full = f"{path}.{name}" if path else name
            known = dims.get(value) if type(value) is int else None
            if known is not None and full not in structure.attrs:
                said = f"{full} repeats the size of {written(known)} and is not declared"
                yield said, replace(structure, attrs={**structure.attrs, full: known})


def _boxes(structure: Structure, axes: Sequence[Axis]) -> Iterator[tuple[str, Structure]]:
    """Axes of the same module that may have to be stored at one width."""
    boxed = {axis.name for box in structure.boxes for axis in box}
    for axis in axes:
        home = axis.name.rpartition(".")[0]
        for other in structure.axes.values():
            adjacent = other.name.rpartition(".")[0] == home and other.width == axis.width
            if other != axis and adjacent and not {axis.name, other.name} & boxed:
                said = f"{axis.name} and {other.name} are stored at one width, and no box says so"
                yield said, replace(structure, boxes=[*structure.boxes, (axis, other)])


def _queries(structure: Structure, axes: Sequence[Axis]) -> Iterator[tuple[str, Structure]]:
    """Tensors of one module that may carry the softmax scale of the width of an axis."""
    for axis in axes:
        known = [each for each in structure.attentions if each.width and axis in each.width.axes]
        others = [each for each in structure.attentions if each not in known]
        home = known[0].module if known else axis.name.rpartition(".")[0]
        modules: dict[str, list[str]] = {}
        for name, layout in structure.tensors.items():
            if name.startswith(f"{home}.") and axis in layout[0].axes:
                modules.setdefault(name.rpartition(".")[0], []).append(name)
        for names in map(tuple, modules.values()):
            if any(each.queries == names for each in known):
                continue
            said = (
                f"the softmax of {home} follows {axis.name} through {', '.join(names)}, "
                f"declared are {', '.join(known[0].queries) if known else 'none'}"
            )
            added = Attention(home, as_dim(axis), names)
            yield said, replace(structure, attentions=[*others, added])


def _orders(structure: Structure, axes: Sequence[Axis]) -> Iterator[tuple[str, Structure]]:
    """Tensors whose parts may lie in another order; alone, and with the others of their module."""
    for name, layout in structure.tensors.items():
        for number, dim in enumerate(layout):
            if not 1 < len(dim.parts) <= _MOST_PARTS or not any(a in dim.axes for a in axes):
                continue
            home = name.rpartition(".")[0]
            together = [
                other
                for other, dims in structure.tensors.items()
                if other.rpartition(".")[0] == home and dim in dims
            ]
            for parts in dict.fromkeys(permutations(dim.parts)):
                if parts == dim.parts:
                    continue
                for names in dict.fromkeys(((name,), tuple(together))):
                    tensors = dict(structure.tensors)
                    for each in names:
                        tensors[each] = tuple(
                            Dim(parts) if one == dim else one for one in tensors[each]
                        )
                    said = (
                        f"{', '.join(names)}: dimension {number} is {written(Dim(parts))}, "
                        "and is declared in another order"
                    )
                    yield said, replace(structure, tensors=tensors)
