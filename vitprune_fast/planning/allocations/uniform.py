"""The same share of every axis of a kind; the lowest scores of each go."""

from __future__ import annotations

from collections.abc import Sequence

from ..problem import Ladder, Problem


def allocate(problem: Problem) -> list[int]:
    """The largest common share that meets the budget, then single kinds step up while they fit."""
    ladders, fits = problem.ladders, problem.fits
    if problem.keep is not None:
        return [ladder.at_share(problem.keep.get(ladder.axis.kind, 1.0)) for ladder in ladders]
    counts = problem.smallest
    # the shares at which any axis changes its count, from the smallest plan up
    shares = sorted(
        {0.0, 1.0}
        | {
            (a + b) / 2 / ladder.width
            for ladder in ladders
            for a, b in zip(ladder.rungs, ladder.rungs[1:], strict=False)
        }
    )
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        candidate = [ladder.at_share(shares[middle]) for ladder in ladders]
        if fits(candidate):
            counts, low = candidate, middle + 1
        else:
            high = middle
    for kind in dict.fromkeys(ladder.axis.kind for ladder in reversed(ladders)):
        while (more := _one_rung_up(ladders, counts, kind)) != counts and fits(more):
            counts = more
    return counts


def _one_rung_up(ladders: Sequence[Ladder], counts: list[int], kind: str) -> list[int]:
    return [
        min((n for n in ladder.rungs if n > count), default=count)
        if ladder.axis.kind == kind
        else count
        for ladder, count in zip(ladders, counts, strict=True)
    ]
