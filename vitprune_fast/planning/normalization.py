"""Make the scores of different axes comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from ..errors import InvalidInput
from ..structure import Structure
from ..structure.reading import Reading
from .problem import Ladder

Normalization = Literal[
    "none", "l2_per_layer", "mean_per_group", "isomorphic", "per_mac", "lamp", "latency"
]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def normalised(
    structure: Structure,
    ladders: Sequence[Ladder],
    normalization: str,
    latency_saved: Mapping[str, float] | None,
    latency_weight: float,
) -> dict[str, np.ndarray]:
    """Axis name -> (width,), what a normalisation makes of a ladder's scores: see ``plan``."""
    raw = {ladder.axis.name: ladder.scores for ladder in ladders}
    if normalization == "none":
        return raw
    if normalization == "isomorphic":
        return _share_ranks(ladders)
    if normalization == "per_mac":
        return {each.axis.name: each.scores / macs_saved(structure, each) for each in ladders}
    if normalization == "mean_per_group":
        return {name: value / (value.mean() or 1.0) for name, value in raw.items()}
    if normalization == "lamp":
        return {name: _lamp(value) for name, value in raw.items()}
    unit = {name: _unit(value) for name, value in raw.items()}
    if normalization == "l2_per_layer":
        return unit
    named = [name for ladder in ladders for name in ladder.group.names]
    if latency_saved is None or {*named} - latency_saved.keys():
        raise InvalidInput(
            "plan: latency_saved must give the seconds one unit of every scored axis saves for the "
            f"normalization 'latency', got {'none' if latency_saved is None else 'fewer axes'}"
        )
    return {
        ladder.axis.name: unit[ladder.axis.name]
        - latency_weight * len(ladder.order) * sum(latency_saved[n] for n in ladder.group.names)
        for ladder in ladders
    }


def _share_ranks(ladders: Sequence[Ladder]) -> dict[str, np.ndarray]:
    """Each unit's rank among all units of its kind, as a share."""
    values: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(ladder.axis.kind for ladder in ladders):
        members = [ladder for ladder in ladders if ladder.axis.kind == kind]
        unit = [_unit(ladder.scores) for ladder in members]
        together = np.concatenate(unit)
        ranks = np.empty(len(together))
        ranks[np.argsort(together, kind="stable")] = np.arange(len(together)) / len(together)
        stops = np.cumsum([len(u) for u in unit])[:-1]
        names = [ladder.axis.name for ladder in members]
        values |= zip(names, np.split(ranks, stops), strict=True)
    return values


def _unit(value: np.ndarray) -> np.ndarray:
    return value / (np.linalg.norm(value) or 1.0)


def _lamp(value: np.ndarray) -> np.ndarray:
    squares = value**2
    order = np.argsort(squares, kind="stable")
    at_least = np.cumsum(squares[order][::-1])[::-1]
    result = np.empty_like(squares)
    result[order] = squares[order] / np.where(at_least > 0, at_least, 1.0)
    return result


def macs_saved(structure: Structure, ladder: Ladder) -> np.ndarray:
    """(width,) multiply-accumulates of what goes at once, from the whole model, in removal order.

    At least 1, so that values may be divided by it.
    """
    whole = Reading.of_counts(structure, {}).macs
    if ladder.held:
        left = [
            Reading.of_counts(structure, {}, ladder.held[unit]).macs
            for unit in ladder.order[0].tolist()
        ]
    else:
        one_less = dict.fromkeys(ladder.group.names, ladder.width - 1)
        left = [Reading.of_counts(structure, one_less).macs] * ladder.width
    return np.maximum(whole - np.array(left, dtype=np.float64), 1.0)
