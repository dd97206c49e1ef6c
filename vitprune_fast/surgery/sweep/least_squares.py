"""A linear map fitted to what it should write, from sums of products, judged on other samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# products of this many columns at once: of a symmetric matrix only blocks on and above the diagonal
_BLOCK = 256
# a ridge is worth the next step of the ladder while the held-out error falls by more than this
_WORTH = 1e-4
_LADDER = 10.0
_LARGEST = 1e3


class Moments:
    """Sums over rows of a ``(rows, K)`` and y ``(rows, C)``: all a least-squares fit of y asks.

    Products are taken in float32 at least, within one call of ``add``, of entries from which the
    mean of the first call is taken off; sums of calls are in float64, in the order of the calls.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: list[Tensor] = []
        self._origin: tuple[Tensor, Tensor] | None = None

    def add(self, a: Tensor, y: Tensor) -> None:
        """Add rows; leading dimensions are flattened."""
        a, y = (t.flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32)) for t in (a, y))
        if self._origin is None:
            self._origin = a.mean(0), y.mean(0)
        a, y = (t - origin for t, origin in zip((a, y), self._origin, strict=True))
        parts = (_gram(a), y.T @ a, a.sum(0), y.sum(0), y.square().sum(0))
        if not self.rows:
            self._sums = [part.double() for part in parts]
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total += part
        self.rows += len(a)

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
        return all(bool(total.isfinite().all()) for total in self._sums)

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of a ``(K,)`` and y ``(C,)``, float64."""
        assert self._origin is not None
        return (
            self._origin[0].double() + self._sums[2] / self.rows,
            self._origin[1].double() + self._sums[3] / self.rows,
        )

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariances of a ``(K, K)`` and of y with a ``(C, K)``, float64."""
        gram, cross, a, y = (total / self.rows for total in self._sums[:4])
        return gram - a.outer(a), cross - y.outer(a)

    def raw(self) -> tuple[Tensor, Tensor]:
        """Means of ``a a^T`` and ``y a^T``, float64."""
        (gram, cross), (a, y) = self.centred(), self.means()
        return gram + a.outer(a), cross + y.outer(a)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean square of ``y - weight a - bias`` over rows, summed over channels."""
        gram, cross, a, y, square = (total / self.rows for total in self._sums)
        assert self._origin is not None
        shift = bias + weight @ self._origin[0].double() - self._origin[1].double()
        found = square.sum() - 2 * (weight * cross).sum() + ((weight @ gram) * weight).sum()
        found = found + shift.square().sum() + 2 * (shift * (weight @ a - y)).sum()
        return max(0.0, float(found))

    def spread(self) -> float:
        """Variance of y, summed over channels."""
        _, _, _, y, square = (total / self.rows for total in self._sums)
        return max(0.0, float((square - y.square()).sum()))


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
    moments: Moments,
    held_out: Moments,
    weight: Tensor,
    bias: Tensor,
    ridge: float,
    *,
    smallest: float = 1e-12,
    has_bias: bool = True,
    rows: Tensor | None = None,
) -> Fitted:
    """The map that changes ``y - W a - b`` least, pulled towards the one there is.

    ``W = W0 + (C - W0 S) (S + ridge * mean(diag S) I)^-1`` and ``b = E[y] - W E[a]``, with S and C
    the covariances of a, and of y with a; without a bias the same of the products themselves. The
    ridge starts where it is told to and goes up or down by factors of ten while the error on the
    held-out rows falls; the bias alone, and the map as it was, compete as well.

    Args:
        moments: of the rows to fit to.
        held_out: of other rows, which choose.
        weight: W0 ``(C, K)``, float64.
        bias: b0 ``(C,)``, float64.
        ridge: to start with, a share of the mean variance of a.
        smallest: no smaller ridge is tried.
        has_bias: whether the map has a bias that can change.
        rows: boolean ``(C,)``, the outputs that may change; None is all.

    Returns:
        The best on the held-out rows.
    """
    gram, cross = moments.centred() if has_bias else moments.raw()
    a, y = moments.means()
    scale = float(gram.diagonal().mean()) if len(gram) else 0.0
    misfit = (cross - weight @ gram).T
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

    def mapped(strength: float) -> tuple[Tensor, Tensor] | None:
        new = weight
        if math.isfinite(strength):
            factor, failed = torch.linalg.cholesky_ex(gram + strength * scale * unit)
            if failed or not factor.isfinite().all():
                return None
            new = weight + torch.cholesky_solve(misfit, factor).T
        shift = y - new @ a if has_bias else bias
        if rows is not None:
            new = torch.where(rows[:, None], new, weight)
            shift = torch.where(rows, shift, bias)
        return new, shift

    best: tuple[float, float | None, Tensor, Tensor]
    best = held_out.error(weight, bias), None, weight, bias

    def tried(strength: float) -> bool:
        """Whether it is better than all before it, and by how much it has to be to go on."""
        nonlocal best
        found = mapped(strength)
        if found is None:
            return False
        error, limit = held_out.error(*found), best[0]
        if error < limit:
            best = error, strength, *found
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
    error, chosen, new, shift = best
    return Fitted(new, shift, chosen, moments.error(weight, bias), moments.error(new, shift), error)


def _gram(a: Tensor) -> Tensor:
    """``a^T a``, computed once for each pair of columns."""
    width = a.shape[1]
    if width <= _BLOCK:
        return a.T @ a
    gram = a.new_empty(width, width)
    for start in range(0, width, _BLOCK):
        block = slice(start, start + _BLOCK)
        gram[block, start:] = a[:, block].T @ a[:, start:]
        gram[start + _BLOCK :, block] = gram[block, start + _BLOCK :].T
    return gram
