"""Make the scores of different axes comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal, get_args

import numpy as np

from ..errors import InvalidInput
from ..structure import Axis, Group, Structure
from ..structure.reading import Reading

Normalization = Literal[
    "none", "l2_per_layer", "mean_per_group", "isomorphic", "per_mac", "lamp", "latency"
]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def normalised(
    structure: Structure,
    raw: dict[str, np.ndarray],
    groups: Sequence[Group],
    normalization: str,
    latency_saved: Mapping[str, float] | None,
    latency_weight: float,
) -> dict[str, np.ndarray]:
    """Axis name -> (units,), what a normalisation makes of the raw scores: see ``plan``."""
    if normalization == "none":
        return raw
    if normalization == "isomorphic":
        return _share_ranks([group.first for group in groups], raw)
    if normalization == "per_mac":
        saved = {group.first.name: macs_per_unit(structure, group) for group in groups}
        return {name: value / saved[name] for name, value in raw.items()}
    if normalization == "mean_per_group":
        return {name: value / (value.mean() or 1.0) for name, value in raw.items()}
    if normalization == "lamp":
        return {name: _lamp(value) for name, value in raw.items()}
    unit = {name: _unit(value) for name, value in raw.items()}
    if normalization == "l2_per_layer":
        return unit
    names = {group.first.name: group.names for group in groups}
    if latency_saved is None or {*chain(*names.values())} - latency_saved.keys():
        raise InvalidInput(
            "plan: latency_saved must give the seconds one unit of every scored axis saves for the "
            f"normalization 'latency', got {'none' if latency_saved is None else 'fewer axes'}"
        )
    saved = {name: sum(latency_saved[each] for each in names[name]) for name in unit}
    return {name: value - latency_weight * saved[name] for name, value in unit.items()}


def _share_ranks(axes: Sequence[Axis], raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each unit's rank among all units of its kind, as a share."""
    values: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(axis.kind for axis in axes):
        names = [axis.name for axis in axes if axis.kind == kind]
        unit = [_unit(raw[name]) for name in names]
        together = np.concatenate(unit)
        ranks = np.empty(len(together))
        ranks[np.argsort(together, kind="stable")] = np.arange(len(together)) / len(together)
        stops = np.cumsum([len(u) for u in unit])[:-1]
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


def macs_per_unit(structure: Structure, group: Group) -> float:
    """Multiply-accumulates that one unit of axes that keep the same ones accounts for."""
    without = Reading.of_counts(structure, dict.fromkeys(group.names, group.first.size - 1))
    return float(max(Reading.of_counts(structure, {}).macs - without.macs, 1))
