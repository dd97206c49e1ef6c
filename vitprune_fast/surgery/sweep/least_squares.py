"""A linear map fitted to what it should write, from sums of products, judged on other samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# products of this many columns at once: of a symmetric matrix only blocks on and above the diagonal
_BLOCK = 128
# the next step of the ladder of ridges is taken while the held-out error falls by more than this
_WORTH = 1e-4
_LADDER = 10.0
_LARGEST = 1e3
# so many outputs choose the ridge of all
_PROBES = 64


class Products:
    """Sums over rows of a ``(rows, K)`` and y ``(rows, C)``: all that a least-squares fit needs.

    Products are taken in float32 at least (in TF32 where torch is told so), within one call of
    ``of``, of entries from which the origin is taken off; sums of calls of ``add`` are in float64,
    in the order of the calls.

    Attributes:
        origin: of a ``(K,)`` and of y ``(C,)``; set once, before the first products.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: list[Tensor] = []
        self.origin: tuple[Tensor, ...] | None = None

    def of(self, a: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The number of some rows, and their products; leading dimensions are flattened."""
        assert self.origin is not None
        a, y = (t - mean for t, mean in zip(_rows(a, y), self.origin, strict=True))
        return torch.tensor(len(a)), _gram(a), y.T @ a, a.sum(0), y.sum(0), y.square().sum(0)

    def add(self, found: Sequence[Tensor]) -> None:
        """Add what :meth:`of` found."""
        rows, *parts = found
        if not self.rows:
            self._sums = [part.double() for part in parts]
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total += part
        self.rows += int(rows)

    @property
    def inputs(self) -> int:
        """K."""
        return len(self._sums[2])

    @property
    def outputs(self) -> int:
        """C."""
        return len(self._sums[3])

    @property
    def is_finite(self) -> bool:
        """Whether no sum overflowed or met NaN."""
        # a sum passes on what is not finite in it
        return all(math.isfinite(total.sum()) for total in self._sums)

    def second(self, *, centred: bool = True) -> Second:
        """Covariances, or mean products as they are."""
        assert self.origin is not None
        gram, cross, a, y, square = (total / self.rows for total in self._sums)
        gram, cross, square = gram - a.outer(a), cross - y.outer(a), square - y.square()
        a, y = (mean + origin.double() for mean, origin in zip((a, y), self.origin, strict=True))
        if centred:
            return Second(gram, cross, square.clamp(min=0), a, y)
        zeros = torch.zeros_like(a), torch.zeros_like(y)
        return Second(gram + a.outer(a), cross + y.outer(a), square + y.square(), *zeros)


@dataclass(frozen=True)
class Second:
    """Second moments of a and y, about their means or, with means of zero, about zero; float64.

    Attributes:
        gram: of a with itself ``(K, K)``.
        cross: of y with a ``(C, K)``.
        square: of y with itself, channel by channel ``(C,)``.
        a: mean taken off ``(K,)``.
        y: mean taken off ``(C,)``.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    a: Tensor
    y: Tensor

    def error(self, weight: Tensor, bias: Tensor, product: Tensor | None = None) -> float:
        """Mean square of ``y - weight a - bias`` over rows, summed over channels.

        Args:
            weight: ``(C, K)``.
            bias: ``(C,)``.
            product: ``weight @ gram``, where it is known.
        """
        product = weight @ self.gram if product is None else product
        found = self.square.sum() + ((product - 2 * self.cross) * weight).sum()
        return max(0.0, float(found + (self.y - weight @ self.a - bias).square().sum()))

    def of(self, outputs: slice) -> Second:
        """The same of some outputs."""
        return Second(self.gram, self.cross[outputs], self.square[outputs], self.a, self.y[outputs])


@dataclass(frozen=True)
class Fitted:
    """A fitted map and what it is worth.

    Attributes:
        weight: ``(C, K)``, float64.
        bias: ``(C,)``, float64.
        ridge: that was chosen; infinite where the bias alone was fitted, None where nothing was.
        before: mean square error on the fitted rows, summed over channels, of the map as it was.
        after: of this one.
        held_out: of this one, on other rows.
    """

    weight: Tensor
    bias: Tensor
    ridge: float | None
    before: float
    after: float
    held_out: float


def fit(
    moments: Products,
    held_out: Products,
    weight: Tensor,
    bias: Tensor,
    ridge: float,
    *,
    smallest: float = 1e-12,
    has_bias: bool = True,
    may_change: Tensor | None = None,
) -> Fitted:
    """The map that changes ``y - W a - b`` least, pulled towards the one there is.

    ``W = W0 + (C - W0 S) (S + ridge * mean(diag S) I)^-1`` and ``b = E[y] - W E[a]``, with S and C
    the covariances of a, and of y with a; without a bias the same of the products themselves. The
    ridge starts where it is told to and goes up or down by factors of ten while the error of some
    outputs on the held-out rows falls; the bias alone competes as well. What is not better than the
    map as it was, by the error of all outputs on the held-out rows, is not taken.

    Args:
        moments: of the rows to fit to.
        held_out: of other rows, which choose.
        weight: W0 ``(C, K)``, float64.
        bias: b0 ``(C,)``, float64; without a bias it is zero.
        ridge: to start with, a share of the mean variance of a.
        smallest: no smaller ridge is tried.
        has_bias: whether the map has a bias that can change.
        may_change: boolean ``(C,)``, the outputs that may; None is all.

    Returns:
        The best on the held-out rows.
    """
    seen, judge = (each.second(centred=has_bias) for each in (moments, held_out))
    scale = float(seen.gram.diagonal().mean()) if len(seen.gram) else 0.0
    product = weight @ seen.gram
    misfit = seen.cross - product

    def mapped(strength: float, outputs: slice) -> tuple[Tensor, Tensor, Tensor] | None:
        """Weight, bias, and weight @ gram; None where there is no solution."""
        change, its_product = torch.zeros_like(weight[outputs]), torch.zeros_like(product[outputs])
        if math.isfinite(strength):
            loaded = seen.gram.clone()
            loaded.diagonal().add_(strength * scale)
            factor, failed = torch.linalg.cholesky_ex(loaded)
            # what is not finite in a row has come to its end
            if failed or not factor.diagonal().isfinite().all():
                return None
            change = torch.cholesky_solve(misfit[outputs].T, factor).T
            # the normal equations: change @ (gram + strength * scale * I) = misfit
            its_product = misfit[outputs] - strength * scale * change
        new, new_product = weight[outputs] + change, product[outputs] + its_product
        shift = seen.y[outputs] - new @ seen.a if has_bias else bias[outputs]
        if may_change is not None:
            own = may_change[outputs]
            new, new_product = (
                torch.where(own[:, None], one, old[outputs])
                for one, old in ((new, weight), (new_product, product))
            )
            shift = torch.where(own, shift, bias[outputs])
        return new, shift, new_product

    before, was = seen.error(weight, bias, product), judge.error(weight, bias)
    if may_change is not None and not may_change.any():
        return Fitted(weight, bias, None, before, before, was)
    probes = slice(None, None, max(1, len(weight) // _PROBES))
    judge_some = judge.of(probes)
    best: tuple[float, float | None] = judge_some.error(weight[probes], bias[probes]), None

    def tried(strength: float) -> bool:
        """Whether it is so much better than all before it that it is worth going on."""
        nonlocal best
        found = mapped(strength, probes)
        if found is None:
            return False
        error, limit = judge_some.error(*found[:2]), best[0]
        if error < limit:
            best = error, strength
        return error < limit * (1 - _WORTH)

    if has_bias:
        tried(math.inf)
    if scale > 0:
        lower = upper = ridge
        tried(ridge)
        while lower / _LADDER >= smallest and tried(lower / _LADDER):
            lower /= _LADDER
        if lower == ridge:
            while upper * _LADDER <= _LARGEST and tried(upper * _LADDER):
                upper *= _LADDER
    chosen = best[1]
    found = None if chosen is None else mapped(chosen, slice(None))
    if found is not None:
        new, shift, new_product = found
        error = judge.error(new, shift)
        if error < was:
            return Fitted(new, shift, chosen, before, seen.error(new, shift, new_product), error)
    return Fitted(weight, bias, None, before, before, was)


def means(a: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of rows: what the origin of products should be near."""
    return tuple(t.mean(0) for t in _rows(a, y))


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Leading dimensions flattened, in float32 at least."""
    return [t.flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _gram(a: Tensor) -> Tensor:
    """``a^T a``, symmetric to the bit: of two columns only one product counts."""
    width = a.shape[1]
    gram = a.new_empty(width, width)
    for start in range(0, width, _BLOCK):
        block = slice(start, start + _BLOCK)
        gram[block, start:] = a[:, block].T @ a[:, start:]
    # of a square block a library may compute both halves, each in an order of its own
    gram.triu_()
    gram += gram.triu(1).T
    return gram
