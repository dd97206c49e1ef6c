"""Sums of products of dimensions, multiplied out, so that they are quick to evaluate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from .axes import Axis, Dim

# a branch, and whether its core is meant or its norm, LayerScale and drop path; None: no branch
Home = tuple[str, bool] | None
# products of stored widths, by the names of their axes, and the factor of each
Polynomial = dict[tuple[str, ...], int]


class Terms:
    """A sum of ``factor * prod(lengths of dims)``, as a function of the stored widths of axes.

    Args:
        axes: names of all axes there are.
        products: what each product belongs to, its factor, its dims.

    Attributes:
        by_home: what belongs together, multiplied out, in the order it was given.
    """

    def __init__(
        self, axes: Collection[str], products: Iterable[tuple[Home, int, tuple[Dim, ...]]]
    ):
        self.by_home: dict[Home, Polynomial] = {}
        for home, factor, dims in products:
            terms: Polynomial = {(): factor}
            for dim in dims:
                terms = _product(terms, _expanded(dim))
            sums = self.by_home.setdefault(home, {})
            for names, each in terms.items():
                sums[names] = sums.get(names, 0) + each
        numbers = {name: number for number, name in enumerate(axes)}
        rows = [names for terms in self.by_home.values() for names in terms]
        # the number behind the last axis is a factor of 1
        self._axes = np.full((len(rows), max(map(len, rows), default=0)), len(numbers))
        for row, names in enumerate(rows):
            self._axes[row, : len(names)] = [numbers[name] for name in names]
        self._factors = np.array(
            [factor for terms in self.by_home.values() for factor in terms.values()], dtype=np.int64
        )
        self._homes = np.repeat(
            np.arange(len(self.by_home)), [len(terms) for terms in self.by_home.values()]
        )
        self._numbers = {home: number for number, home in enumerate(self.by_home)}

    def total(self, widths: np.ndarray, gone: Iterable[Home] = ()) -> int:
        """The sum, exact.

        Args:
            widths: int64, stored widths of all axes in order, and 1 behind them.
            gone: what no longer counts.
        """
        counts = np.ones(len(self._numbers), dtype=np.int64)
        counts[[self._numbers[home] for home in gone if home in self._numbers]] = 0
        products = widths[self._axes].prod(1) * self._factors * counts[self._homes]
        return int(products.sum())

    def over(self, varying: Collection[str], widths: Mapping[str, int]) -> dict[Home, Polynomial]:
        """The polynomials in some axes alone, where all others have the given widths."""
        return {home: _fixed(terms, varying, widths) for home, terms in self.by_home.items()}


def _fixed(terms: Polynomial, varying: Collection[str], widths: Mapping[str, int]) -> Polynomial:
    fixed: Polynomial = {}
    for names, factor in terms.items():
        left = tuple(name for name in names if name in varying)
        for name in names:
            factor *= 1 if name in varying else widths[name]
        fixed[left] = fixed.get(left, 0) + factor
    return fixed


def _expanded(dim: Dim) -> Polynomial:
    terms: Polynomial = {}
    for part in dim.parts:
        names = tuple(sorted(factor.name for factor in part if isinstance(factor, Axis)))
        size = int(np.prod([factor for factor in part if isinstance(factor, int)], dtype=np.int64))
        terms[names] = terms.get(names, 0) + size
    return terms


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for left, x in a.items():
        for right, y in b.items():
            names = tuple(sorted((*left, *right)))
            product[names] = product.get(names, 0) + x * y
    return product
