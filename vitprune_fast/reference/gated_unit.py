"""Oracle of ``ops.gated_unit``, and the activations themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune_fast.wide import wide_dtype

# what a model computes in its forward
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
}


def value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """An activation and its derivative, elementwise, in the dtype of ``x``."""
    if activation == "relu":
        return F.relu(x), (x > 0).to(x.dtype)
    if activation == "sigmoid":
        gate = torch.sigmoid(x)
        return gate, gate * (1 - gate)
    if activation == "gelu":
        gate = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * gate, gate + x * density
    # the rest are x * sigmoid(z)
    if activation == "gelu_tanh":
        rate = 2 * math.sqrt(2 / math.pi)
        z, slope_of_z = rate * (x + 0.044715 * x**3), rate * (1 + 3 * 0.044715 * x * x)
    else:
        rate = {"silu": 1.0, "quick_gelu": 1.702}[activation]
        z, slope_of_z = rate * x, rate
    gate = torch.sigmoid(z)
    return x * gate, gate + x * gate * (1 - gate) * slope_of_z


def gated_unit(
    x_BNF: Tensor, value_BNF: Tensor | None, gate_F: Tensor, activation: str = "gelu"
) -> Tensor:
    """``act(x) * value * gate``, and 0 where the gate is 0, whatever ``x`` and ``value`` hold.

    Computed in fp64 for fp64 inputs, else in fp32, and rounded once to the dtype of ``x``.
    """
    h, _ = value_and_slope(x_BNF.to(gate_F.dtype), activation)
    if value_BNF is not None:
        h = h * value_BNF.to(gate_F.dtype)
    return closed(gate_F, h * gate_F).to(x_BNF.dtype)


def gated_unit_backward(
    x_BNF: Tensor,
    value_BNF: Tensor | None,
    gate_F: Tensor | None,
    grad_BNF: Tensor,
    activation: str = "gelu",
    per_token: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of ``x`` and ``value``, and ``score[b, f] = sum_n h * grad``.

    With h = act(x) * value; without a gate it is 1. The score is, by sample, the gradient of the
    gate, exact at 0 too, where those of ``x`` and ``value`` are 0. With ``per_token`` the magnitude
    of each token's share is summed.
    """
    dtype = wide_dtype(x_BNF)
    act, slope = value_and_slope(x_BNF.to(dtype), activation)
    grad = grad_BNF.to(dtype)
    through = grad if gate_F is None else grad * gate_F
    grad_value_BNF = None
    if value_BNF is None:
        h, grad_x_BNF = act, through * slope
    else:
        value = value_BNF.to(dtype)
        h, grad_x_BNF = act * value, through * value * slope
        grad_value_BNF = closed(gate_F, through * act).to(x_BNF.dtype)
    share = h * grad
    score_BF = (share.abs() if per_token else share).sum(1)
    return closed(gate_F, grad_x_BNF).to(x_BNF.dtype), grad_value_BNF, score_BF


def closed(gate_F: Tensor | None, product: Tensor) -> Tensor:
    """A product with gates, in which a gate of 0 leaves 0 of everything, NaN and Inf too."""
    return product if gate_F is None else torch.where(gate_F == 0, 0.0, product)


def halves(x_BN2F: Tensor, packed: str) -> tuple[Tensor, Tensor]:
    """What goes through the activation, and the value, as views of the tensor that holds both."""
    first, last = x_BN2F.tensor_split(2, -1)
    return (first, last) if packed == "x_first" else (last, first)
