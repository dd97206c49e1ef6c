"""What can be removed from a model, as one declarative table."""

from __future__ import annotations

from torch import nn

from ..errors import InvalidInput, UnsupportedArchitecture
from .axes import UNIT_KINDS, Axis, Dim, Group
from .table import Structure

__all__ = ["UNIT_KINDS", "Axis", "Dim", "Group", "Structure", "describe"]

SUPPORTED = ("timm VisionTransformer", "timm VisionTransformerDistilled")


def describe(model: nn.Module, input_size: int | tuple[int, ...] | None = None) -> Structure:
    """List what can be removed from ``model``: its axes and the layout of every tensor.

    Args:
        model: a model of a supported family; it is only read.
        input_size: side, (height, width) or (channels, height, width) of the images the cost is
            counted for; None takes the size the model was built for.

    Returns:
        The Structure. It holds names and sizes only, no tensor of the model.

    Raises:
        UnsupportedArchitecture: the family, a block or a tensor of the model has no layout here.
        InvalidInput: ``input_size`` has another form, or smaller images than one patch.
    """
    from . import timm_vit

    if type(model) not in timm_vit.MODELS:
        raise UnsupportedArchitecture(
            f"describe: model must be one of {', '.join(SUPPORTED)}, got {type(model).__name__}"
        )
    image = None if input_size is None else _image(input_size)
    return timm_vit.describe(model, image)


def _image(input_size: int | tuple[int, ...]) -> tuple[int, int]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InvalidInput(
            "describe: input_size must be a side, (height, width) or (channels, height, width), "
            f"got {input_size!r}"
        )
    return size
