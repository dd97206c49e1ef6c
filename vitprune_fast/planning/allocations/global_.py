"""The least valuable units of all axes together go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..problem import Ladder, Problem


def allocate(problem: Problem) -> list[int]:
    """Drop the lowest steps of all axes together until the budget holds, then fill it up."""
    ladders, values = problem.ladders, problem.values
    if problem.keep is not None:
        counts = [ladder.rungs[0] for ladder in ladders]
        for kind, share in problem.keep.items():
            members = [i for i, ladder in enumerate(ladders) if ladder.axis.kind == kind]
            _drop_share(ladders, counts, members, values, share)
        return counts
    drops = _drops(ladders, values, range(len(ladders)))
    low, high = 0, len(drops)
    while low < high:
        middle = (low + high) // 2
        if problem.fits(_after(ladders, drops[:middle])):
            high = middle
        else:
            low = middle + 1
    counts = _after(ladders, drops[:low])
    blocked = set[int]()
    for i, rung in reversed(drops[:low].tolist()):
        # a step may come back only after the better ones of its axis
        if i in blocked:
            continue
        more = list(counts)
        more[i] = ladders[i].rungs[rung - 1]
        if problem.fits(more):
            counts = more
        else:
            blocked.add(i)
            if len(blocked) == sum(len(ladder.rungs) > 1 for ladder in ladders):
                break
    return counts


def _drops(
    ladders: Sequence[Ladder], values: Mapping[str, np.ndarray], members: Sequence[int] | range
) -> np.ndarray:
    """Steps down the ladders in the order they are taken, (steps, 2): axis, rung reached."""
    heights, steps = [np.empty(0)], [np.empty((0, 2), dtype=np.int64)]
    for i in members:
        ladder = ladders[i]
        means = _means(values[ladder.axis.name], ladder.rungs)
        # a normalisation may break the order within an axis: a step waits for those below it
        heights.append(np.maximum.accumulate(means))
        rungs = np.arange(1, len(ladder.rungs))
        steps.append(np.stack([np.full_like(rungs, i), rungs], axis=1))
    height, step = np.concatenate(heights), np.concatenate(steps)
    # on a tie the last axis goes first, and every axis goes down in order
    return step[np.lexsort((step[:, 1], -step[:, 0], height))]


def _means(ranked: np.ndarray, rungs: Sequence[int]) -> np.ndarray:
    """Mean value of the units that each step takes."""
    if rungs == tuple(range(rungs[0], rungs[-1] - 1, -1)):
        return ranked[len(ranked) - rungs[0] : len(ranked) - rungs[-1]]
    ends = [len(ranked) - rung for rung in rungs]
    return np.array([ranked[a:b].mean() for a, b in pairwise(ends)])


def _after(ladders: Sequence[Ladder], drops: np.ndarray) -> list[int]:
    """What every axis keeps after some first steps."""
    taken = np.bincount(drops[:, 0], minlength=len(ladders))
    return [ladder.rungs[rung] for ladder, rung in zip(ladders, taken.tolist(), strict=True)]


def _drop_share(
    ladders: Sequence[Ladder],
    counts: list[int],
    members: list[int],
    values: Mapping[str, np.ndarray],
    share: float,
) -> None:
    """Drop steps of the member axes until no more than the share of their units is left."""
    goal = round(share * sum(ladders[i].width * ladders[i].breadth for i in members))
    left = sum(counts[i] * ladders[i].breadth for i in members)
    for i, rung in _drops(ladders, values, members).tolist():
        if left <= goal:
            break
        left -= (counts[i] - ladders[i].rungs[rung]) * ladders[i].breadth
        counts[i] = ladders[i].rungs[rung]
