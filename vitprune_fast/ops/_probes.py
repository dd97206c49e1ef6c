"""What the ops share that leave scores behind, and hand them to probes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast import _checks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def score_dtype(x: Tensor) -> torch.dtype:
    """What the score of ``x`` is accumulated and returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_probe(
    op: str, name: str, probe: Tensor, shape: tuple[int, ...], x_name: str, x: Tensor
) -> None:
    """Raise unless the probe ``name`` has that shape, the dtype of the score, and a place by ``x``.

    Args:
        op: name of the op, for the error sentence.
        name: of the argument.
        probe: what was given for it.
        shape: one number per sample and unit.
        x_name: of the argument that is scored.
        x: what was given for it.
    """
    _checks.require_tensor(op, name, probe)
    why = ", one number per sample and unit of "
    _checks.require_shape(op, name, probe, shape, why + x_name)
    wanted = score_dtype(x)
    if probe.dtype != wanted:
        rule = f"have dtype {wanted}, that of the score"
        _checks.require(False, op, name, rule, probe.dtype)
    _checks.require_near(op, name, probe, x_name, x)


def refuse_second_derivative(op: str) -> None:
    """Raise in a backward that is itself recorded, where the result would be cut off silently."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: create_graph must be False, as there is no second derivative, got True"
        )
