"""What can be removed from a model, as one declarative table."""

from __future__ import annotations

from torch import nn

from ..bare import bare
from ..errors import InvalidInput
from . import families
from .axes import DEPTH_KINDS, UNIT_KINDS, Axis, Dim, Group
from .families import Family, register_family
from .table import Structure

__all__ = [
    "DEPTH_KINDS",
    "UNIT_KINDS",
    "Axis",
    "Dim",
    "Family",
    "Group",
    "Structure",
    "describe",
    "register_family",
]


def describe(model: nn.Module, input_size: int | tuple[int, ...] | None = None) -> Structure:
    """List what can be removed from ``model``: its axes and the layout of every tensor.

    Args:
        model: a model of a supported family, or DataParallel, DistributedDataParallel or
            ``torch.compile`` around one, which all steps look through; it is only read.
        input_size: side, (height, width) or (channels, height, width) of the images the cost is
            counted for; None takes the size the model was built for.

    Returns:
        The Structure. It holds names and sizes only, no tensor of the model.

    Raises:
        UnsupportedArchitecture: the family, a block or a tensor of the model has no layout here.
        InvalidInput: ``input_size`` has another form, or smaller images than one patch; or the head
            has other classes than the model says.
    """
    model = bare("describe", model)
    family = families.of(model)
    structure = family.describe(model, None if input_size is None else _image(input_size))
    computing = [write.name for write in structure.writes()]
    structure.depth = sum(
        any(name.startswith(f"{block}.") for name in computing)
        for block in family.block_paths(model)
    )
    return structure


def _image(input_size: int | tuple[int, ...]) -> tuple[int, int]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InvalidInput(
            "describe: input_size must be a side, (height, width) or (channels, height, width), "
            f"got {input_size!r}"
        )
    return size
