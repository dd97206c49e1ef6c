"""What the ops share that leave scores behind, and hand them to probes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast import _checks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def score_dtype(x: Tensor) -> torch.dtype:
    """What the score of ``x`` is accumulated and returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    wanted = score_dtype(x)
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype == wanted
        and value.device == x.device
    ):
        return
    _checks.require_tensor(op, name, value)
    _checks.require_shape(op, name, value, shape, why)
    rule = f"have dtype {wanted}, in which {x_name} is computed"
    _checks.require(value.dtype == wanted, op, name, rule, value.dtype)
    _checks.require_near(op, name, value, x_name, x)


def refuse_second_derivative(op: str) -> None:
    """Raise in a backward that is itself recorded, where the result would be cut off silently."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: create_graph must be False, as there is no second derivative, got True"
        )
