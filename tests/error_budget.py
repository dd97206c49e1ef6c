"""The tolerance of every fast op, derived from rounding: that of plain torch, and that of its sums.

Torch adds in another order on another processor and may be lucky there, so its own error alone is
no measure. :class:`Rounded` says what may be expected of any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Rounded:
    """Numbers, and how far rounding may have put each of them off, as a formula goes on.

    A sum of n terms is off by ``sqrt(n) x unit roundoff x sum of magnitudes``: n roundings, each of
    no more than that sum and of random sign. On a GPU the tensor cores add 16 products of 16-bit
    numbers at a time and cut off what they should round: n / 16 errors of one sign, each below an
    ulp of a sum that grows evenly, are within twice the above up to 1,024 terms. Errors of
    different origin add as the root of the sum of their squares, so what a number was computed from
    counts as much as it bears on the result.
    Kernels compute in fp32, and in fp64 for fp64, whatever dtype they round the result to.
    """

    def __init__(self, value: Tensor, roundoff: float, *errors: Tensor) -> None:
        self.value, self.roundoff = value, roundoff
        self.error = sum((e.square() for e in errors), torch.zeros_like(value)).sqrt()

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> Rounded:
        """An input, which is exact, of an op for ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cut_off = 2 if x.is_cuda and dtype.itemsize == 2 else 1
        return cls(x.detach().double().cpu(), cut_off * torch.finfo(wide).eps / 2)

    def _rounded(self, value: Tensor, *errors: Tensor) -> Rounded:
        return Rounded(value, self.roundoff, self.roundoff * value.abs(), *errors)

    def _apart(self, other: Rounded | Tensor | float) -> tuple[Tensor, Tensor]:
        if isinstance(other, Rounded):
            return other.value, other.error
        value = torch.as_tensor(other, dtype=torch.float64)
        return value, torch.zeros_like(value)

    def __add__(self, other: Rounded | Tensor | float) -> Rounded:
        value, error = self._apart(other)
        return self._rounded(self.value + value, self.error, error)

    def __sub__(self, other: Rounded | Tensor | float) -> Rounded:
        value, error = self._apart(other)
        return self._rounded(self.value - value, self.error, error)

    def __mul__(self, other: Rounded | Tensor | float) -> Rounded:
        value, error = self._apart(other)
        return self._rounded(self.value * value, self.error * value, error * self.value)

    def __matmul__(self, other: Rounded) -> Rounded:
        a, b, terms = self.value, other.value, self.value.shape[-1]
        carried = self.error.square() @ b.square() + a.square() @ other.error.square()
        own = math.sqrt(terms) * self.roundoff * (a.abs() @ b.abs())
        return Rounded(a @ b, self.roundoff, own, carried.sqrt())

    def sum(self, dim: int | tuple[int, ...]) -> Rounded:
        total, magnitude = self.value.sum(dim), self.value.abs().sum(dim)
        terms = self.value.numel() / max(total.numel(), 1)
        own = math.sqrt(terms) * self.roundoff * magnitude
        return Rounded(total, self.roundoff, own, self.error.square().sum(dim).sqrt())

    def mean(self, dim: int) -> Rounded:
        return (self.sum(dim) * (1 / max(self.value.shape[dim], 1))).unsqueeze(dim)

    def exp(self) -> Rounded:
        value = self.value.exp()
        return self._rounded(value, value * self.error)

    def power(self, exponent: float) -> Rounded:
        slope = exponent * self.value ** (exponent - 1)
        return self._rounded(self.value**exponent, slope * self.error)

    def logsumexp(self) -> Rounded:
        """Over the last dimension, which is kept."""
        value = self.value.logsumexp(-1, keepdim=True)
        carried = ((self.value - value).exp() * self.error).square().sum(-1, keepdim=True).sqrt()
        # the sum of exponentials is off by a factor, and the logarithm makes that a difference
        own = torch.full_like(value, math.sqrt(self.value.shape[-1]) * self.roundoff)
        return self._rounded(value, own, carried)

    def stored(self, dtype: torch.dtype) -> Rounded:
        """Once more rounded, to a ``dtype`` that is perhaps shorter."""
        short = torch.finfo(dtype).eps / 2 * self.value.abs()
        return Rounded(self.value, self.roundoff, self.error, short)

    @classmethod
    def stack(cls, parts: list[Rounded], dim: int) -> Rounded:
        values, errors = zip(*((part.value, part.error) for part in parts), strict=True)
        return cls(torch.stack(values, dim), parts[0].roundoff, torch.stack(errors, dim))

    @property
    def mT(self) -> Rounded:
        return Rounded(self.value.mT, self.roundoff, self.error.mT)

    def transpose(self, one: int, other: int) -> Rounded:
        error = self.error.transpose(one, other)
        return Rounded(self.value.transpose(one, other), self.roundoff, error)

    def unsqueeze(self, dim: int) -> Rounded:
        return Rounded(self.value.unsqueeze(dim), self.roundoff, self.error.unsqueeze(dim))

    def squeeze(self, dim: int) -> Rounded:
        return Rounded(self.value.squeeze(dim), self.roundoff, self.error.squeeze(dim))

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> Rounded:
        error = self.error.unflatten(dim, sizes)
        return Rounded(self.value.unflatten(dim, sizes), self.roundoff, error)

    def masked_fill(self, mask: Tensor, value: float) -> Rounded:
        error = self.error.masked_fill(mask, 0)
        return Rounded(self.value.masked_fill(mask, value), self.roundoff, error)


def assert_within_budget(
    got: Tensor, eager: Tensor, exact: Tensor, sums: Rounded | None = None
) -> None:
    """Largest error of ``got`` <= 2 x the larger of eager's and that of the sums + 2 ulp.

    ``exact`` is of higher precision than both; the ulp is that of the dtype of ``got`` at the
    largest exact magnitude. ``sums`` is the result with the error that rounding may give its sums;
    None where nothing is summed.
    """
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return
    largest = exact.abs().max().to(got.dtype)
    ulp = (torch.nextafter(largest, largest.new_tensor(torch.inf)) - largest).double().item()
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    bound = sums.error.max().item() if sums is not None and sums.error.numel() else 0.0
    budget = 2 * max(eager_error, bound) + 2 * ulp
    detail = f"2 x max(eager {eager_error:.2e}, sums {bound:.2e}) + 2 ulp"
    assert error <= budget, f"error {error:.2e} > {budget:.2e} = {detail}"
