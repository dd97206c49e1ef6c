"""Oracle of ``ops.gated_activation``."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.reference.activation_score import value_and_slope


def gated_activation(x_BNF: Tensor, gate_F: Tensor, activation: str = "gelu") -> Tensor:
    """``act(x) * gate``, and 0 where the gate is 0, whatever ``x`` holds.

    Computed in fp64 for fp64 inputs, else in fp32, and rounded once to the dtype of ``x``.
    """
    value, _ = value_and_slope(x_BNF.to(gate_F.dtype), activation)
    return closed(gate_F, value * gate_F).to(x_BNF.dtype)


def gated_activation_backward(
    x_BNF: Tensor, gate_F: Tensor, grad_BNF: Tensor, activation: str = "gelu"
) -> tuple[Tensor, Tensor]:
    """``grad_x = grad * gate * act'(x)`` and, by sample, ``grad_gate[b, f] = sum_n act(x) * grad``.

    The gradient of a gate is exact at 0 too, where that of ``x`` is 0.
    """
    value, slope = value_and_slope(x_BNF.to(gate_F.dtype), activation)
    grad = grad_BNF.to(gate_F.dtype)
    grad_x_BNF = closed(gate_F, grad * gate_F * slope).to(x_BNF.dtype)
    return grad_x_BNF, (value * grad).sum(1)


def closed(gate_F: Tensor, product: Tensor) -> Tensor:
    """A product with gates, in which a gate of 0 leaves 0 of everything, NaN and Inf too."""
    return torch.where(gate_F == 0, 0.0, product)
