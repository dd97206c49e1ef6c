"""Argument checks shared by the ops: one sentence that says what was wanted and what was got.

A check that holds costs less than a microsecond: sentences are made where one does not.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vitprune_fast.errors import InvalidInput
from vitprune_fast.wide import wide_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What the ops take."""


def require(condition: bool, op: str, argument: str, rule: str, got: object) -> None:
    """Raise ``InvalidInput`` with ``<op>: <argument> must <rule>, got <got>`` unless it holds."""
    if not condition:
        raise InvalidInput(f"{op}: {argument} must {rule}, got {got}")


def require_tensor(op: str, argument: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")


def require_input(
    op: str, argument: str, value: object, dims: int, dtypes: Collection[torch.dtype]
) -> None:
    """Raise unless ``value`` is a tensor of ``dims`` dimensions and one of ``dtypes``."""
    if not isinstance(value, Tensor) or value.dim() != dims or value.dtype not in dtypes:
        require_tensor(op, argument, value)
        assert isinstance(value, Tensor)
        require_dims(op, argument, value, dims)
        require_dtype(op, argument, value, dtypes)


def require_dims(op: str, argument: str, value: Tensor, dims: int) -> None:
    """Raise unless ``value`` has ``dims`` dimensions."""
    if value.dim() != dims:
        require(False, op, argument, f"have {dims} dimensions", tuple(value.shape))


def require_dtype(op: str, argument: str, value: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Raise unless the dtype of ``value`` is one of ``dtypes``."""
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        require(False, op, argument, f"be {names}", value.dtype)


def require_shape(
    op: str, argument: str, value: Tensor, shape: tuple[int, ...], why: str = ""
) -> None:
    """Raise unless ``value`` has that shape; ``why`` ends the rule."""
    if value.shape != shape:
        require(False, op, argument, f"have shape {shape}{why}", tuple(value.shape))


def require_near(op: str, argument: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` is on the device of ``other``."""
    if value.device != other.device:
        require(False, op, argument, f"be on {other.device} like {other_name}", value.device)


def require_like(op: str, argument: str, value: object, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` is a tensor of the shape, dtype and device of ``other``."""
    require_tensor(op, argument, value)
    for what in ("shape", "dtype", "device"):
        got, wanted = getattr(value, what), getattr(other, what)
        if got != wanted:
            if what == "shape":
                got, wanted = tuple(got), tuple(wanted)
            require(False, op, argument, f"have {what} {wanted} like {other_name}", got)


def check_wide(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], why: str, x_name: str, x: Tensor
) -> None:
    """Raise unless ``value`` has that shape, the dtype that ``x`` is computed in, and its device.

    Args:
        op: name of the op, for the error sentence.
        name: of the argument, a probe or a gate.
        value: what was given for it.
        shape: a number for each unit.
        why: what the numbers are for, ``", one number per ..."``.
        x_name: of the argument that has the units.
        x: what was given for it.
    """
    wanted = wide_dtype(x)
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype == wanted
        and value.device == x.device
    ):
        return
    require_tensor(op, name, value)
    require_shape(op, name, value, shape, why)
    rule = f"have dtype {wanted}, in which {x_name} is computed"
    require(value.dtype == wanted, op, name, rule, value.dtype)
    require_near(op, name, value, x_name, x)


def refuse_second_derivative(op: str) -> None:
    """Raise in a backward that is itself recorded, where the result would be cut off silently."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: create_graph must be False, as there is no second derivative, got True"
        )
