"""A table compared with the model itself: no plan is tried, the fault is named."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn

from ..structure import Axis, Dim, Structure
from ..structure.paths import get

# what was found, and where
Fault = tuple[str, str]


def layout_faults(model: nn.Module, structure: Structure) -> Iterator[Fault]:
    """Tensors without a layout of their shape, layouts without a tensor, ties that are not."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name in sorted(tensors.keys() | structure.tensors.keys()):
        if name not in structure.tensors:
            yield name, "has no layout"
        elif name not in tensors:
            yield name, "has a layout, and the model has no such parameter or buffer"
        else:
            shape = tuple(dim.length() for dim in structure.tensors[name])
            if shape != tuple(tensors[name].shape):
                yield name, f"has the shape {tuple(tensors[name].shape)}, its layout is of {shape}"
    firsts: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = firsts.setdefault(id(tensor), name)
        noted = structure.ties.get(name, name)
        if noted != first:
            yield name, f"is the same tensor as {first}, the ties say {noted}"


def declaration_faults(model: nn.Module, structure: Structure) -> Iterator[Fault]:
    """Names of nothing, values that are others, and layouts inside a module that do not fit."""
    for name, layout in structure.tensors.items():
        for axis in (axis for dim in layout for axis in dim.axes):
            if structure.axes.get(axis.name) != axis:
                yield name, f"runs over {axis.name}, which is not that axis of the table, or none"
    yield from _names_of_nothing(model, structure)
    for path, dim in structure.attrs.items():
        value = get(model, path)
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if first != dim.length():
            yield path, f"is {value!r}, and is declared to be {dim.length()}"
    # heads may keep different numbers of dims, and what shares a box different numbers of units
    filled = {axis.name for axis in structure.axes.values() if axis.parent is not None}
    filled |= {axis.name for box in structure.boxes for axis in box if len(box) > 1}
    for path, dim in structure.norms.items():
        for axis in dim.axes:
            if axis.name in filled - structure.unpaddable:
                yield axis.name, f"may be filled with zeros, over which {path} takes statistics"
    for path, module in model.named_modules():
        weight, bias = (structure.tensors.get(f"{path}.{name}") for name in ("weight", "bias"))
        if isinstance(module, nn.Linear) and weight and bias and not _alike(bias[0], weight[0]):
            yield (
                f"{path}.bias",
                f"is laid out as {written(bias[0])}, the rows of its weight as "
                f"{written(weight[0])}",
            )
        if getattr(module, "normalized_shape", None):
            affine = [layout[0] for layout in (weight, bias) if layout]
            over = structure.norms.get(path)
            if over is None and any(list(dim.axes) for dim in affine):
                yield path, f"is a norm over {written(affine[0])}, and no norm is declared there"
            elif over is not None and not all(_alike(dim, over) for dim in affine):
                yield path, f"is declared to be a norm over {written(over)}, its weight is not"


def _names_of_nothing(model: nn.Module, structure: Structure) -> Iterator[Fault]:
    modules = {"": "", **{path: "" for path, _ in model.named_modules()}}
    for write in structure.writes():
        for path in (write.name, write.projection, *write.helpers):
            if path not in modules and path not in structure.tensors:
                yield path, f"is named by the branch {write.name}, and is no module"
    for where, paths in (
        ("norms", structure.norms),
        ("work", [work.module for work in structure.work]),
        ("attentions", [attention.module for attention in structure.attentions]),
    ):
        for path in paths:
            if path not in modules:
                yield path, f"is named by the {where}, and is no module"
    for attention in structure.attentions:
        for name in attention.queries:
            if not isinstance(get(model, name), Tensor):
                yield name, f"holds queries of {attention.module}, and is no tensor"
    written_by = {write.name for write in structure.writes()}
    for axis in structure.axes.values():
        for held in structure.held(axis):
            for name in held:
                if name not in written_by:
                    yield name, f"is a unit of {axis.name}, and the stream has no such branch"


def _alike(one: Dim, other: Dim) -> bool:
    """Whether entries belong to the same units in the same order."""
    axes = {axis.name: axis for axis in (*one.axes, *other.axes)}
    return one.length() == other.length() and all(
        np.array_equal(one.owners(axis), other.owners(axis)) for axis in axes.values()
    )


def written(dim: Dim) -> str:
    """A dimension as it is declared, with the full names of its axes."""
    return " + ".join(
        " * ".join(factor.name if isinstance(factor, Axis) else str(factor) for factor in part)
        for part in dim.parts
    )
