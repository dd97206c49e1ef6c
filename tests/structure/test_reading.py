"""What is left of a model: by unit numbers, by bare counts, and under gates."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.plans import KINDS, draw_plan
from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning import Plan, predict_cost
from vitprune_fast.structure import Axis, Structure, describe
from vitprune_fast.structure.axes import as_dim
from vitprune_fast.structure.reading import Reading
from vitprune_fast.structure.terms import Terms
from vitprune_fast.testing import VITS, random_vit

COUNTED = ("head", "neuron", "embed")


def draw_counts(structure: Structure, seed: int) -> dict[str, int]:
    """How many units stay, of each group alike; now and then none of an axis."""
    rng = random.Random(seed)
    return {
        name: rng.choice([0, *range(1, group.first.size + 1)])
        for group in structure.groups
        if group.first.kind in COUNTED
        for name in group.names
        if group.first.kind != "embed" or seed % 2
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("config", VITS)
def test_counts_mean_what_a_plan_with_these_counts_means(config: str, seed: int) -> None:
    structure = describe(random_vit(config))
    counts = draw_counts(structure, seed)
    plan = Plan.of(structure, {name: range(count) for name, count in counts.items()})
    assert predict_cost(structure, counts) == predict_cost(structure, plan)
    ours, theirs = Reading.of_counts(structure, counts), Reading(structure, plan)
    dims = {dim for layout in structure.tensors.values() for dim in layout}
    for dim in dims:
        assert ours.gather(dim).tolist() == theirs.gather(dim).tolist()
    assert ours.fates == theirs.fates


def test_counts_of_dims_are_counts_in_every_head() -> None:
    structure = describe(random_vit())
    names = ("qk_dims", "v_dims")
    counts = {f"blocks.1.attn.{name}": count for name, count in zip(names, (3, 5), strict=True)}
    kept = {
        name: [head * 8 + dim for head in range(3) for dim in range(count)]
        for name, count in counts.items()
    }
    cost = predict_cost(structure, counts)
    assert cost == predict_cost(structure, Plan.of(structure, kept))
    # each is as wide as it has dims
    assert cost.useful_macs == cost.macs


def test_branches_that_go_beside_counts() -> None:
    structure = describe(random_vit("res_post_norm"))
    counts = {"blocks.1.attn.heads": 0, "blocks.2.mlp.neurons": 7}
    kept = {name: range(count) for name, count in counts.items()}
    removed = ("blocks.0.mlp", "blocks.1.attn")
    ours = Reading.of_counts(structure, counts, removed)
    theirs = Reading(structure, Plan.of(structure, kept, removed))
    assert (ours.params, ours.macs) == (theirs.params, theirs.macs)
    assert ours.fates == theirs.fates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", VITS)
def test_useful_entries_are_those_that_hold_kept_units(config: str, kind: str) -> None:
    structure = describe(random_vit(config))
    reading = Reading(structure, draw_plan(structure, kind, random.Random(1)))
    for layout in structure.tensors.values():
        for dim in layout:
            assert reading.useful(dim) == len(reading.kept_positions(dim))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", VITS)
def test_gates_that_are_open_or_shut_give_the_widths_of_the_plan(config: str, seed: int) -> None:
    structure, rng = describe(random_vit(config)), random.Random(seed)
    kept: dict[str, Any] = {
        axis.name: sorted(rng.sample(range(axis.size), rng.randint(1, axis.size)))
        for axis in structure.axes.values()
        if axis.kind in COUNTED[:2]
    }
    openness = {
        name: torch.zeros(structure.axes[name].size, dtype=torch.float64).index_fill_(
            0, torch.tensor(units), 1.0
        )
        for name, units in kept.items()
    }
    soft = Reading.of_openness(structure, openness)
    assert {name: float(width) for name, width in soft.extent.items()} == (
        Reading(structure, Plan.of(structure, kept)).extent
        | {name: 3.0 for name in structure.branches}
        | {"blocks": 3.0}
    )


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"blocks.0.attn.heads": 4}, "from 0 to all, got 4"),
        ({"blocks.0.attn.heads": -1}, "from 0 to all, got -1"),
        ({"blocks.0.attn.v_dims": 9}, "which has 8 units"),
        ({"nowhere": 1}, "which has no units"),
        ({"blocks": 2}, "a plan says which branches and blocks go"),
        ({"embed": 2.5}, "must be whole numbers .* got 2.5"),
        ({"embed": True}, "must be whole numbers .* got True"),
        ({"embed": [1, 2]}, r"must be whole numbers .* got \[1, 2\]"),
        ([1], "must be a Plan, or a mapping from axis names to counts, got list"),
    ],
)
def test_counts_that_are_not_possible_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        predict_cost(describe(random_vit()), counts)


def test_axes_that_share_parameters_have_one_count() -> None:
    model = random_vit()
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    structure = describe(model)
    names = [f"blocks.{number}.mlp.neurons" for number in (0, 2)]
    alike = dict.fromkeys(names, 40)
    plan = Plan.of(structure, {name: range(40) for name in names})
    assert predict_cost(structure, alike) == predict_cost(structure, plan)
    with pytest.raises(InvalidInput, match=f"{names[0]!r} and {names[1]!r} must be the same"):
        predict_cost(structure, {names[0]: 40})
    # of a branch that goes, nothing is shared any more
    left = Reading.of_counts(structure, {names[0]: 40}, ("blocks.2.mlp",))
    other = Plan.of(structure, {names[0]: range(40)}, ("blocks.2.mlp",))
    assert left.params == Reading(structure, other).params


def test_terms_are_sums_of_products() -> None:
    a, b = Axis("a", 4, "head"), Axis("b", 6, "neuron")
    products = [
        (None, 3, (a + b, as_dim(2))),
        (("x", True), 1, (a * 5, as_dim(b))),
        (("x", False), 7, (as_dim(b),)),
    ]
    terms = Terms(["a", "b"], products)
    assert terms.by_home[None] == {("a",): 6, ("b",): 6}
    widths = np.array([2, 3, 1])
    assert terms.total(widths) == 6 * 5 + 5 * 2 * 3 + 7 * 3
    assert terms.total(widths, [("x", True)]) == 6 * 5 + 7 * 3
    over = terms.over({"a"}, {"b": 3})
    assert over[None] == {("a",): 6, (): 18}
    assert over["x", True] == {("a",): 15}
