"""The tail of the normal distribution that GELU takes in the kernels: no erf, but a polynomial."""

from __future__ import annotations

import torch
from exact_activations import exact_value_and_slope, rounded

from vitprune_fast.kernels._activations import DEGREE, LOG2_TAIL
from vitprune_fast.ops import gated_unit_score

FP64 = torch.float64


def polynomial(a: torch.Tensor) -> torch.Tensor:
    powers = a[:, None] ** torch.arange(DEGREE.value + 1)
    return powers @ torch.tensor(LOG2_TAIL.value, dtype=FP64)


def fitted_error(a: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> float:
    """The least largest weighted error of a polynomial, by Lawson's reweighted least squares."""
    powers = a[:, None] ** torch.arange(DEGREE.value + 1)
    shares, least = torch.full_like(a, 1 / len(a)), float("inf")
    for _ in range(200):
        scale = shares.sqrt() * weight
        solved = torch.linalg.lstsq(powers * scale[:, None], (wanted * scale)[:, None]).solution
        error = ((powers @ solved)[:, 0] - wanted).abs() * weight
        least = min(least, error.max().item())
        # a floor, so that no point is lost for ever
        shares *= error / error.max() + 1e-4
        shares /= shares.sum()
    return least


def test_coefficients_are_as_good_as_any_of_their_degree():
    # denser at both ends, where the errors of such fits are largest
    a = 3.5 * (1 - torch.linspace(0, torch.pi, 2001, dtype=FP64).cos())
    log_tail = torch.special.log_ndtr(-a)
    wanted = log_tail / torch.log(torch.tensor(2.0, dtype=FP64))
    # an error of log2 moves the tail by as much x ln 2 x tail, and the value by |x| times that
    weight = log_tail.exp() * torch.log(torch.tensor(2.0, dtype=FP64)) * a.clamp(min=1)
    error = ((polynomial(a) - wanted).abs() * weight).max().item()
    # the constant is fixed, so that the tail of 0 is a half, and all are numbers of fp32
    assert error <= 1.15 * fitted_error(a, wanted, weight) < 2**-24 / 3
    assert all(c == torch.tensor(c, dtype=torch.float32).item() for c in LOG2_TAIL.value)


def test_polynomial_falls_for_ever():
    a = torch.cat([torch.linspace(0, 50, 50_001), torch.logspace(1.7, 4, 1000)]).double()
    got = polynomial(a)
    assert (got.diff() < 0).all()
    assert got[a >= 14].max() < -149, "fp32 has no smaller number than 2**-149"


def test_gelu_in_fp32_is_off_by_few_roundings():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(-16, 16, 4001, dtype=torch.float32)[None, None]
    # with one token and a gradient of 1 the score is the value, and the gradient the slope
    slope, _, value = gated_unit_score(
        x.to(device), torch.ones_like(x, device=device), backend="triton"
    )
    exact_value, exact_slope = (rounded(y, x.shape) for y in exact_value_and_slope(x, "gelu"))
    # of the tail, of its product, of the density's, and of the result, which is below 1.2
    bound = 4 * 2**-24
    assert (slope.cpu() - exact_slope).abs().max() <= bound
    assert ((value.cpu() - exact_value[0]).abs() / x[0].abs().clamp(min=1)).max() <= bound
