"""Oracle of ``ops.gated_glu``."""

from __future__ import annotations

from torch import Tensor

from vitprune_fast.reference.activation_score import value_and_slope
from vitprune_fast.reference.gated_activation import closed


def gated_glu(
    gate_BNF: Tensor, value_BNF: Tensor, gate_F: Tensor, activation: str = "silu"
) -> Tensor:
    """``act(gate) * value * gate_F``, and 0 where ``gate_F`` is 0, whatever the others hold.

    Computed in fp64 for fp64 inputs, else in fp32, and rounded once to the dtype of ``gate``.
    """
    act, _ = value_and_slope(gate_BNF.to(gate_F.dtype), activation)
    return closed(gate_F, act * value_BNF.to(gate_F.dtype) * gate_F).to(gate_BNF.dtype)


def gated_glu_backward(
    gate_BNF: Tensor, value_BNF: Tensor, gate_F: Tensor, grad_BNF: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and value, and by sample that of ``gate_F``: ``sum_n h * grad``.

    With h = act(gate) * value; the gradient of a gate is exact at 0 too, where the others are 0.
    """
    act, slope = value_and_slope(gate_BNF.to(gate_F.dtype), activation)
    value, grad = value_BNF.to(gate_F.dtype), grad_BNF.to(gate_F.dtype)
    through = grad * gate_F
    grad_gate_BNF = closed(gate_F, through * value * slope).to(gate_BNF.dtype)
    grad_value_BNF = closed(gate_F, through * act).to(gate_BNF.dtype)
    return grad_gate_BNF, grad_value_BNF, (act * value * grad).sum(1)
