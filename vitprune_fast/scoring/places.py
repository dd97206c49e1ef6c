"""Where the units of an axis pass by in a forward: what hooks measure or select away there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..structure import Axis, Dim, Structure
from ..structure.paths import get


@dataclass(frozen=True)
class Place:
    """What enters or leaves a module, or is normalised by it, with units along the last dimension.

    Args:
        module: path of the module.
        at: which of the three.
        owner: (length,) int64, the unit of each entry; -1 is nobody's.
    """

    module: str
    at: Literal["input", "output", "norm"]
    owner: Tensor


def places_of(model: nn.Module, structure: Structure, axis: Axis) -> tuple[Place, ...]:
    """Everything that reads units of ``axis``, the norms first: they stand before a Linear.

    Units are read by norms across the axis and by the inputs of Linear layers. The product of
    queries and keys is no module: where no Linear reads an axis, the outputs that make its units
    stand in for it.
    """
    norms, inputs, outputs = [], [], []
    for path, dim in structure.norms.items():
        if axis in dim.axes:
            norms.append(Place(path, "norm", _owners(dim, axis)))
    for name, layout in structure.tensors.items():
        module, _, tensor = name.rpartition(".")
        if tensor == "weight" and isinstance(get(model, module), nn.Linear):
            out, in_ = layout
            if axis in out.axes:
                outputs.append(Place(module, "output", _owners(out, axis)))
            if axis in in_.axes:
                inputs.append(Place(module, "input", _owners(in_, axis)))
    return (*norms, *(inputs or outputs))


def _owners(dim: Dim, axis: Axis) -> Tensor:
    return torch.from_numpy(dim.owners(axis))
