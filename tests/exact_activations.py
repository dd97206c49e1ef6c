"""What the test of gated_unit needs: values of high precision."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

# digits enough to round to fp64 correctly
mpmath.mp.dps = 40


def _gate(x, activation: str):
    """The distribution function that x is multiplied by, and its density, as mpmath numbers."""
    if activation == "gelu":
        return mpmath.ncdf(x), mpmath.npdf(x)
    if activation == "gelu_tanh":
        rate, cube = 2 * mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
        z, slope = rate * (x + cube * x**3), rate * (1 + 3 * cube * x**2)
    else:
        slope = {"quick_gelu": mpmath.mpf("1.702")}.get(activation, mpmath.mpf(1))
        z = slope * x
    lower, upper = 1 / (1 + mpmath.exp(z)), 1 / (1 + mpmath.exp(-z))
    return upper, slope * lower * upper


def _value_and_slope(x, activation: str):
    if activation == "relu":
        return max(x, mpmath.mpf(0)), mpmath.mpf(x > 0)
    gate, density = _gate(x, activation)
    if activation == "sigmoid":
        return gate, density
    return x * gate, gate + x * density


def exact_value_and_slope(x: Tensor, activation: str) -> tuple[list, list]:
    """An activation and its derivative at every element, as flat lists of mpmath numbers."""
    pairs = [_value_and_slope(mpmath.mpf(v), activation) for v in x.double().flatten().tolist()]
    return [value for value, _ in pairs], [slope for _, slope in pairs]


def rounded(numbers: list, shape) -> Tensor:
    """mpmath numbers as fp64."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).reshape(shape)


def sum_of_tokens(shares: list, shape, per_token: bool) -> Tensor:
    """The exact sums over the tokens of flat (B, N, F) mpmath numbers, rounded to (B, F) fp64."""
    batch, tokens, columns = shape
    sums = [
        mpmath.fsum(
            shares[b * tokens * columns + f : (b + 1) * tokens * columns : columns], per_token
        )
        for b in range(batch)
        for f in range(columns)
    ]
    return rounded(sums, (batch, columns))
