"""Argument checks shared by the ops: one sentence that says what was wanted and what was got.

A check that holds costs less than a microsecond: sentences are made where one does not.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vitprune_fast.errors import InvalidInput


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


def require_index(op: str, argument: str, index: Tensor, device: torch.device) -> None:
    """Raise unless ``index`` is 1-D int64 on ``device``."""
    require_tensor(op, argument, index)
    require_dims(op, argument, index, 1)
    require_dtype(op, argument, index, (torch.int64,))
    if index.device != device:
        require(False, op, argument, f"be on {device} like the source", index.device)


def require_index_values(op: str, argument: str, index: Tensor, size: int) -> None:
    """Raise unless ``index`` holds numbers from -1 to ``size - 1``.

    They are not read while a graph is traced; the native kernels check them again.
    """
    if torch.compiler.is_compiling() or index.is_meta or index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < -1 or high >= size:
        rule = f"hold numbers from -1 to {size - 1}"
        require(False, op, argument, rule, low if low < -1 else high)
