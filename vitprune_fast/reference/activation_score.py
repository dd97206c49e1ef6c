"""Oracle of ``ops.activation_score``, and the activations themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

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


def activation_score(
    x_BNF: Tensor, grad_BNF: Tensor, activation: str = "gelu", *, per_token: bool = False
) -> tuple[Tensor, Tensor]:
    """``grad_x = grad * act'(x)`` and ``score[b, f] = sum_n act(x) * grad``.

    With ``per_token`` the magnitude of each token's share is summed. Computed in fp64 for fp64
    inputs, else in fp32; the gradient then gets the dtype of ``x``.
    """
    dtype = torch.float64 if x_BNF.dtype == torch.float64 else torch.float32
    grad = grad_BNF.to(dtype)
    value, slope = value_and_slope(x_BNF.to(dtype), activation)
    share = value * grad
    score_BF = (share.abs() if per_token else share).sum(1)
    return (grad * slope).to(x_BNF.dtype), score_BF
