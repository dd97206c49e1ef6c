"""Allocations meet their budget as closely as a step allows, and keep the best units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprune_fast.errors import InfeasibleBudget, InvalidInput
from vitprune_fast.planning import Budget, Plan, cost, plan, predict_cost
from vitprune_fast.planning.allocate import FOLDER
from vitprune_fast.planning.constraints import Constraints
from vitprune_fast.planning.normalization import NORMALIZATIONS, macs_saved
from vitprune_fast.registry import names
from vitprune_fast.scoring import Scores
from vitprune_fast.structure import Structure, describe
from vitprune_fast.surgery import prune
from vitprune_fast.testing import random_vit

ALLOCATIONS = names(FOLDER)

MODEL = random_vit(dtype=torch.float32)
STRUCTURE = describe(MODEL)


def random_scores(structure: Structure, seed: int = 0, kinds=("head", "neuron")) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values = {
        axis.name: torch.rand(axis.size, generator=generator)
        for kind in kinds
        for axis in structure.units(kind)
    }
    return Scores(values, "taylor", "abs", 1)


SCORES = random_scores(STRUCTURE)
FULL = predict_cost(STRUCTURE)
NEURONS = "blocks.0.mlp.neurons"
LATENCY = {name: 1e-3 for name in SCORES}


@settings(max_examples=60)
@given(
    share=st.floats(0.35, 1.0),
    measure=st.sampled_from(["macs", "params"]),
    allocation=st.sampled_from(ALLOCATIONS),
    normalization=st.sampled_from(NORMALIZATIONS),
    seed=st.integers(0, 99),
    step=st.sampled_from([1, 4, 8]),
)
def test_budgets_are_met_to_one_step(
    share: float, measure: str, allocation: Any, normalization: Any, seed: int, step: int
) -> None:
    scores = random_scores(STRUCTURE, seed)
    made = plan(
        STRUCTURE,
        scores,
        Budget(macs=share) if measure == "macs" else Budget(params=share),
        allocation,
        normalization,
        round_to={"neuron": step},
        latency_saved=LATENCY,
    )
    predicted = getattr(predict_cost(STRUCTURE, made), measure)
    whole = getattr(FULL, measure)
    assert predicted <= share * whole
    assert all(len(made[name]) % step == 0 for name in made if name.endswith("neurons"))
    assert all(len(made[name]) >= 1 for name in scores)
    # no axis (for uniform: no kind) can take another step
    kinds = (
        [[n] for n in scores]
        if allocation == "global"
        else [[n for n in scores if n.endswith(kind)] for kind in ("heads", "neurons")]
    )
    for kind in kinds:
        more = {n: _one_more(made, n, step if n.endswith("neurons") else 1) for n in kind}
        if all(more[n] == made[n] for n in kind):
            continue
        kept = {n: made[n] for n in scores} | more
        # a head of this model weighs more than a step of neurons, so it may stay out
        assert getattr(predict_cost(STRUCTURE, Plan.of(STRUCTURE, kept)), measure) > share * whole


def _one_more(made: Plan, name: str, step: int) -> list[int]:
    lost = sorted(set(range(made.size(name))) - set(made[name]))
    return sorted(made[name] + lost[:step])


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_best_units_of_an_axis_stay(allocation: Any) -> None:
    made = plan(STRUCTURE, SCORES, Budget(macs=0.5), allocation)
    for name, score in SCORES.items():
        lost = sorted(set(range(made.size(name))) - set(made[name]))
        if lost:
            assert score[made[name]].min() >= score[lost].max()


def test_uniform_keeps_the_same_share_everywhere() -> None:
    made = plan(STRUCTURE, SCORES, Budget(macs=0.6), "uniform")
    for kind in ("head", "neuron"):
        assert len({len(made[axis.name]) for axis in STRUCTURE.units(kind)}) == 1


def test_keep_ratios() -> None:
    budget = Budget(keep={"head": 2 / 3, "neuron": 0.25})
    uniform = plan(STRUCTURE, SCORES, budget, "uniform")
    assert [len(uniform[a.name]) for a in STRUCTURE.units("head")] == [2, 2, 2]
    assert [len(uniform[a.name]) for a in STRUCTURE.units("neuron")] == [24, 24, 24]
    everywhere = plan(STRUCTURE, SCORES, budget, "global")
    assert sum(len(everywhere[a.name]) for a in STRUCTURE.units("head")) == 6
    assert sum(len(everywhere[a.name]) for a in STRUCTURE.units("neuron")) == 72
    only_heads = plan(STRUCTURE, SCORES, Budget(keep={"head": 1 / 3}), "uniform")
    assert [len(only_heads[a.name]) for a in STRUCTURE.units("neuron")] == [96, 96, 96]


def test_absolute_budgets_and_shares_agree() -> None:
    share = plan(STRUCTURE, SCORES, Budget(params=0.5))
    absolute = plan(STRUCTURE, SCORES, Budget(params=int(0.5 * FULL.params)))
    assert share == absolute
    assert plan(STRUCTURE, SCORES, Budget(macs=1.0)).keeps_everything


def test_at_least_one_unit_by_default_and_zero_on_request() -> None:
    scores = Scores(
        {n: torch.zeros_like(v) if "blocks.1" in n else v for n, v in SCORES.items()},
        "taylor", "abs", 1,
    )  # fmt: skip
    budget = Budget(macs=0.4)
    default = plan(STRUCTURE, scores, budget, normalization="none")
    assert len(default["blocks.1.attn.heads"]) == len(default["blocks.1.mlp.neurons"]) == 1
    zero = plan(STRUCTURE, scores, budget, normalization="none", min_units=0)
    assert zero["blocks.1.attn.heads"] == zero["blocks.1.mlp.neurons"] == []
    only_heads = plan(STRUCTURE, scores, budget, normalization="none", min_units={"head": 0})
    assert only_heads["blocks.1.attn.heads"] == []
    assert len(only_heads["blocks.1.mlp.neurons"]) == 1
    pruned = prune(MODEL, zero)
    assert cost(pruned).macs == predict_cost(STRUCTURE, zero).macs <= 0.4 * FULL.macs


def test_larger_budgets_keep_more() -> None:
    kept = [
        sum(len(plan(STRUCTURE, SCORES, Budget(macs=share))[n]) for n in SCORES)
        for share in (0.3, 0.5, 0.7, 0.9)
    ]
    assert kept == sorted(kept)


def test_signed_scores_rank_by_magnitude() -> None:
    values = {n: v.clone() for n, v in SCORES.items()}
    signed = Scores({n: -v for n, v in values.items()}, "taylor", "signed", 1)
    assert plan(STRUCTURE, signed, Budget(macs=0.5)) == plan(STRUCTURE, SCORES, Budget(macs=0.5))


def test_ties_keep_the_lower_numbers() -> None:
    flat = Scores({n: torch.ones_like(v) for n, v in SCORES.items()}, "magnitude", "l2", 0)
    made = plan(STRUCTURE, flat, Budget(keep={"neuron": 0.5}), "uniform")
    assert made["blocks.0.mlp.neurons"] == list(range(48))


def test_isomorphic_cuts_kinds_by_the_same_share() -> None:
    made = plan(random_vit(num_heads=6), random_scores(describe(random_vit(num_heads=6))),
                Budget(macs=0.5), normalization="isomorphic")  # fmt: skip
    heads = sum(len(made[f"blocks.{i}.attn.heads"]) for i in range(3)) / 18
    neurons = sum(len(made[f"blocks.{i}.mlp.neurons"]) for i in range(3)) / 288
    assert abs(heads - neurons) <= 1 / 18


def test_per_mac_divides_by_what_a_unit_saves() -> None:
    # a row of fc1 and a column of fc2 at five tokens of width 24
    (ladder,) = Constraints(("neuron",)).ladders(STRUCTURE, {NEURONS: SCORES[NEURONS].numpy()})
    assert macs_saved(STRUCTURE, ladder).tolist() == [2 * 5 * 24] * 96


def test_lamp_scores_as_published() -> None:
    from vitprune_fast.planning.normalization import _lamp

    got = _lamp(np.array([3.0, 1.0, 2.0]))
    assert got == pytest.approx([9 / 9, 1 / 14, 4 / 13])


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_budget_that_cannot_be_met_names_the_smallest(allocation: Any) -> None:
    with pytest.raises(InfeasibleBudget) as error:
        plan(STRUCTURE, SCORES, Budget(macs=0.05), allocation)
    smallest = Plan.of(STRUCTURE, {n: [0] for n in SCORES})
    assert f"{predict_cost(STRUCTURE, smallest).macs:,} macs" in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "macs, params or keep must be given"),
        ({"macs": 0}, "share in"),
        ({"macs": -1}, "share in"),
        ({"macs": 50.0}, "50 % is 0.5"),
        ({"macs": float("nan")}, "share in"),
        ({"macs": float("inf")}, "share in"),
        ({"macs": "half"}, "share in"),
        ({"keep": {}}, "map unit kinds"),
        ({"keep": {"heads": 0.5}}, "must name unit kinds"),
        ({"keep": {"head": 1.5}}, r"share in \[0, 1\]"),
    ],
)
def test_budgets_that_say_nothing_possible_are_refused(args: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Budget(**args)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(
    ("hidden", "round_to", "step"),
    [
        (264, None, 8),
        (256, None, 1),
        (260, None, 1),
        (264, {"head": 1}, 8),
        (264, {"neuron": 1}, 1),
        (264, 1, 1),
        (256, {"neuron": 16}, 16),
    ],
)
def test_large_axes_keep_multiples_of_8(
    allocation: str, hidden: int, round_to: Any, step: int
) -> None:
    structure = describe(random_vit(mlp_ratio=hidden / 24))
    sizes = {axis.size for axis in structure.units("neuron")}
    assert sizes == {hidden}
    scores = random_scores(structure, kinds=("neuron",))
    counts = [
        len(kept)
        for share in np.linspace(0.66, 0.95, 12)
        for kept in _kept(structure, scores, share, allocation, round_to)
    ]
    assert all(count % step == 0 for count in counts) and max(counts) < hidden
    assert any(count % (2 * step) for count in counts), "steps are no larger than they should be"


def test_large_embeddings_keep_multiples_of_8() -> None:
    structure = describe(random_vit(embed_dim=264))
    scores = random_scores(structure, kinds=("embed",))
    for round_to, step in ((None, 8), (1, 1)):
        counts = [
            len(kept)
            for share in np.linspace(0.66, 0.95, 12)
            for kept in _kept(structure, scores, share, "global", round_to, units=["embed"])
        ]
        assert all(count % step == 0 for count in counts) and max(counts) < 264
        assert any(count % (2 * step) for count in counts)


def _kept(structure: Structure, scores: Scores, share: Any, *how: Any, **units: Any) -> list:
    """The units of each scored axis that a plan for a share of the MACs keeps."""
    allocation, round_to = how
    budget = Budget(macs=float(share))
    made = plan(structure, scores, budget, allocation, round_to=round_to, **units)
    return [made[name] for name in scores]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"allocation": "random"}, "allocation must be one of"),
        ({"normalization": "l3"}, "normalization must be one of"),
        ({"min_units": -1}, "min_units must be a whole number >= 0"),
        ({"round_to": 0}, "round_to must be a whole number >= 1"),
        ({"round_to": {"neurons": 64}}, "round_to must name kinds among .*, got 'neurons'"),
        ({"min_units": {"neuron": None}}, "min_units must be a whole number >= 0, got None"),
        ({"normalization": "latency"}, "latency_saved must give"),
    ],
)
def test_wrong_arguments_are_refused(args: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(STRUCTURE, SCORES, Budget(macs=0.5), **args)


def test_scores_of_another_model_are_refused() -> None:
    other = random_scores(describe(random_vit(mlp_ratio=2.0)))
    with pytest.raises(InvalidInput, match="scores must belong to this model"):
        plan(STRUCTURE, other, Budget(macs=0.5))
    broken = Scores(
        {**SCORES, "blocks.0.attn.heads": torch.full((3,), float("nan"))}, "t", "abs", 1
    )
    with pytest.raises(InvalidInput, match="must be finite"):
        plan(STRUCTURE, broken, Budget(macs=0.5))
    with pytest.raises(InvalidInput, match="cover the unit kinds"):
        plan(STRUCTURE, random_scores(STRUCTURE, kinds=("neuron",)), Budget(keep={"head": 0.5}))
    with pytest.raises(InfeasibleBudget, match=r"got 50 macs \(.*; 50 % is written 0\.5;"):
        plan(STRUCTURE, SCORES, 50)
    with pytest.raises(InvalidInput, match=r"units must hold .* head, neuron without 'embed'"):
        plan(STRUCTURE, SCORES, Budget(keep={"head": 0.5, "embed": 0.5}))


def test_numbers_of_numpy_are_numbers() -> None:
    share, count = Budget(macs=np.float32(0.5)), Budget(params=np.int64(9000))  # pyright: ignore
    assert plan(STRUCTURE, SCORES, share) == plan(STRUCTURE, SCORES, Budget(macs=0.5))
    assert count.limits(FULL) == {"params": 9000}
    kept = [*np.arange(0, 96, 2).tolist(), np.int64(95)]
    made = Plan.of(STRUCTURE, {"blocks.0.mlp.neurons": kept})
    assert type(made["blocks.0.mlp.neurons"][-1]) is int
