"""Whether 16 bits rank units as 32 do, seen on the first samples of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from ..batches import Numbered
from .scores import Scores

# so many batches, and so many samples of them
BATCHES, SAMPLES = 2, 64


def split_off(batches: Iterable[Any]) -> tuple[Any, Any]:
    """The first samples of checked batches (images, labels), and all batches again."""
    if isinstance(batches, Numbered):
        few = range(min(BATCHES, len(batches)))
        return batches.first(min(SAMPLES, sum(len(batches.labels(0, k)) for k in few))), batches
    stream, taken = iter(batches), []
    for batch in stream:
        taken.append(batch)
        if len(taken) == BATCHES or sum(len(labels) for _, labels in taken) >= SAMPLES:
            break
    first, room = [], SAMPLES
    for images, labels in taken:
        first.append((images[:room], labels[:room]))
        room -= len(first[-1][1])
    return first, chain(taken, stream)


def rank_agreement(one: Scores, other: Scores) -> float:
    """Spearman's rank correlation inside each axis, averaged over the axes; in [-1, 1].

    Equal scores share their mean rank. Axes of one unit say nothing and are left out; where no
    other is there, the agreement is 1.
    """
    found = [
        _spearman(one.ranking(axis), other.ranking(axis)) for axis in one if len(one[axis]) > 1
    ]
    return sum(found) / len(found) if found else 1.0


def _spearman(one: Tensor, other: Tensor) -> float:
    a, b = (_ranks(each) for each in (one, other))
    if a.equal(b):
        # also where all are equal, which leaves the correlation undefined
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    spread = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values the mean of theirs; fp64."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count + 1) / 2)[place]


def agreement_text(provenance: Mapping[str, str]) -> str:
    """What scores say of it, in words; empty where there was nothing to compare."""
    if "rank_agreement" not in provenance:
        return ""
    agreement = float(provenance["rank_agreement"])
    return (
        f"rank agreement of {provenance['dtype']} with float32 {agreement:.4f} "
        f"(Spearman inside each axis, {provenance['rank_agreement_samples']} images)"
    )
