"""Hulls against every possible plan of a small model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from vitprune_fast.planning.allocations.hulls import lower_hull

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.scoring import Scores
from vitprune_fast.testing import random_vit

MODEL = random_vit(depth=2)
OPTIONS = {"allocation": "hulls", "normalization": "none", "round_to": {"neuron": 24}}


def scores() -> Scores:
    structure, values = vp.describe(MODEL), {}
    generator = torch.Generator().manual_seed(0)
    for kind in ("head", "neuron"):
        for axis in structure.units(kind):
            values[axis.name] = torch.rand(axis.size, generator=generator) ** 2
    return Scores(values, "taylor", "square", 8)


def lost(plan: vp.Plan, found: Scores) -> float:
    return sum(float(v.sum() - v[plan[name]].sum()) for name, v in found.items())


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8])
def test_no_plan_of_the_cost_loses_much_less(share: float) -> None:
    structure, found = vp.describe(MODEL), scores()
    plan = vp.plan(MODEL, found, vp.Budget(macs=share), **OPTIONS)
    cost = vp.predict_cost(structure, plan).macs
    assert cost <= share * vp.predict_cost(structure).macs
    # all plans that keep the best units of each axis, as many as the steps allow
    best = {n: v.argsort(descending=True).tolist() for n, v in found.items()}
    steps = {n: (24, 48, 72, 96) if len(v) == 96 else (1, 2, 3) for n, v in found.items()}
    least = min(
        lost(each, found)
        for counts in product(*steps.values())
        for each in [
            vp.Plan.of(
                structure,
                {n: sorted(best[n][:k]) for n, k in zip(steps, counts, strict=True)},
            )
        ]
        if vp.predict_cost(structure, each).macs <= cost
    )
    # greedy is optimal at the costs it reaches on its way, up to points above a hull
    assert lost(plan, found) <= 1.2 * least


def test_points_above_a_line_are_none_of_the_hull() -> None:
    points = [(0, 4.0, 0), (1, 3.5, 1), (2, 1.0, 2), (3, 0.0, 3)]
    assert lower_hull(points) == [points[0], points[2], points[3]]


def test_shares_of_units_have_no_costs() -> None:
    with pytest.raises(InvalidInput, match="budget must be in macs or params for 'hulls'"):
        vp.plan(MODEL, scores(), vp.Budget(keep={"head": 0.5}), **OPTIONS)
