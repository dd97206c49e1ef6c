"""Which units a plan may take: kinds, bounds, multiples, patterns, depth, and what binds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprune_fast.errors import InfeasibleBudget, InvalidInput
from vitprune_fast.planning import Budget, Plan, cost, plan, predict_cost
from vitprune_fast.planning.allocate import FOLDER
from vitprune_fast.planning.constraints import DEPTH_KINDS
from vitprune_fast.planning.normalization import NORMALIZATIONS
from vitprune_fast.registry import names
from vitprune_fast.scoring import Scores
from vitprune_fast.structure import UNIT_KINDS, Axis, Structure, describe
from vitprune_fast.surgery import prune
from vitprune_fast.testing import random_pvt, random_vit

MODEL = random_vit(depth=4, dtype=torch.float32)
VIT = describe(MODEL)
STAGES = describe(random_pvt("b2"))
# q/k norms are shared by the heads, so their dims have no parent
SHARED = describe(random_vit("qk_norm", depth=4))
STRUCTURES = {"plain": VIT, "stages": STAGES, "shared dims": SHARED}
# one of the blocks that are no ends
INNER = {"plain": "blocks.1", "stages": "stages.2.blocks.1", "shared dims": "blocks.1"}
FULL = predict_cost(VIT)


def random_scores(structure: Structure, seed: int = 0) -> Scores:
    """Of all units there are."""
    generator = torch.Generator().manual_seed(seed)
    values = {n: torch.rand(a.size, generator=generator) for n, a in structure.axes.items()}
    return Scores(values, "taylor", "square", 1)


SCORES = random_scores(VIT)


def rows(made: Plan, axis: Axis) -> set[int]:
    """How many units an axis keeps; of dims, each of the heads that stay."""
    if axis.parent is None:
        return {len(made[axis.name])}
    heads = made[axis.parent.name]
    return {sum(unit // axis.width == head for unit in made[axis.name]) for head in heads}


def gone(structure: Structure, made: Plan, axis: Axis) -> bool:
    """Whether the branch that holds an axis was removed."""
    return axis in structure.axes_in(made.removed)


kinds = st.lists(st.sampled_from(UNIT_KINDS), min_size=1, unique=True)
shares = st.floats(0.3, 1.0)


@settings(max_examples=1000)
@given(
    model=st.sampled_from([*STRUCTURES]),
    seed=st.integers(0, 9999),
    units=kinds,
    measures=st.sampled_from([("macs",), ("params",), ("macs", "params")]),
    share=shares,
    larger=shares,
    allocation=st.sampled_from(names(FOLDER)),
    normalization=st.sampled_from([n for n in NORMALIZATIONS if n != "latency"]),
    min_units=st.sampled_from([0, 1, 2]),
    step=st.sampled_from([1, 4]),
    bound=st.tuples(st.floats(0.0, 0.4), st.floats(0.6, 1.0)),
    protected=st.sampled_from([None, "", ".mlp.*"]),
)
def test_invariants_of_plans(
    model: str,
    seed: int,
    units: list[str],
    measures: tuple[str, ...],
    share: float,
    larger: float,
    allocation: str,
    normalization: Any,
    min_units: int,
    step: int,
    bound: tuple[float, float],
    protected: str | None,
) -> None:
    structure = STRUCTURES[model]
    protect = () if protected is None else (INNER[model] + protected,)
    options: dict[str, Any] = {
        "allocation": allocation,
        "normalization": normalization,
        "units": units,
        "min_units": min_units,
        "round_to": {"neuron": step, "embed": step},
        "bounds": {"neuron": bound} if "neuron" in units else None,
        "protect": protect,
    }
    scores = random_scores(structure, seed)
    whole = predict_cost(structure)

    def made(budget: Mapping[str, Any]) -> Plan | None:
        try:
            return plan(structure, scores, budget, **options)
        except InfeasibleBudget as error:
            # the smallest value that it names is one that can be met
            least, measure = re.findall(r"at least ([\d,]+) (macs|params)", str(error))[0]
            smallest = plan(structure, scores, {measure: int(least.replace(",", ""))}, **options)
            assert getattr(predict_cost(structure, smallest), measure) == int(
                least.replace(",", "")
            )
            limit = int(budget[measure] * getattr(whole, measure))
            assert limit < int(least.replace(",", ""))
            return None

    first = made(dict.fromkeys(measures, share))
    if first is None:
        return
    counted = predict_cost(structure, first)
    for measure in measures:
        assert getattr(counted, measure) <= share * getattr(whole, measure)
    for name, axis in structure.axes.items():
        if axis.kind not in units and not gone(structure, first, axis):
            parent = axis.parent is not None and len(first[axis.parent.name]) < axis.parent.size
            if not (parent or structure.held(axis)):
                assert len(first[name]) == axis.size, "a kind that is not to be cut"
        if gone(structure, first, axis) or structure.held(axis):
            continue
        assert len(rows(first, axis)) <= 1, "heads keep as many dims each"
        if axis.kind in ("neuron", "embed") and axis.kind in units:
            assert len(first[name]) % step == 0
        if axis.kind == "neuron" and axis.kind in units:
            low, high = bound
            kept = len(first[name])
            if protect and name.startswith(protect[0].rstrip("*")):
                assert kept == axis.size
            else:
                # counts that no multiple reaches are rounded up
                assert round(low * axis.size, 9) <= kept <= round(high * axis.size, 9)
        elif axis.kind in units and (axis.parent is None or first[axis.parent.name]):
            assert min(rows(first, axis), default=min_units) >= min(min_units, axis.width)
    paths = [*structure.blocks]
    kept_blocks = {paths[unit] for unit in first["blocks"]}
    assert {paths[0], paths[-1]} <= kept_blocks
    assert {path.rpartition(".")[0] for path in kept_blocks} == {
        path.rpartition(".")[0] for path in paths
    }, "every stage keeps a block"
    assert not protect or INNER[model] in kept_blocks
    if len(measures) == 1:
        more = made({measures[0]: max(share, larger)})
        assert more is not None
        of_more = getattr(predict_cost(structure, more), measures[0])
        assert of_more >= getattr(counted, measures[0]), "a larger budget never costs less"


@pytest.mark.parametrize("kind", UNIT_KINDS)
def test_every_kind_meets_a_budget_alone(kind: str) -> None:
    share = {"block": 0.6, "embed": 0.6, "neuron": 0.6, "mlp_branch": 0.75}.get(kind, 0.9)
    made = plan(MODEL, SCORES, share, units=[kind])
    assert not made.keeps_everything
    predicted = predict_cost(VIT, made)
    assert predicted.macs <= share * FULL.macs
    counted = cost(prune(MODEL, made))
    assert (counted.macs, counted.params) == (predicted.macs, predicted.params)


def test_budgets_may_be_written_in_short() -> None:
    half = plan(VIT, SCORES, Budget(macs=0.5))
    assert plan(VIT, SCORES, 0.5) == plan(VIT, SCORES, {"macs": 0.5}) == half
    for wrong in ("half", True, {"mac": 0.5}, None):
        with pytest.raises(InvalidInput, match="budget must be a Budget, a share"):
            plan(VIT, SCORES, wrong)  # pyright: ignore[reportArgumentType]


def test_two_measures_hold_together() -> None:
    both = predict_cost(VIT, plan(VIT, SCORES, {"macs": 0.7, "params": 0.6}))
    assert both.macs <= 0.7 * FULL.macs and both.params <= 0.6 * FULL.params
    tight = predict_cost(VIT, plan(VIT, SCORES, {"macs": 0.9, "params": 0.6}))
    assert tight == predict_cost(VIT, plan(VIT, SCORES, {"params": 0.6}))


@pytest.mark.parametrize("allocation", names(FOLDER))
def test_shares_of_kinds_and_a_cost_share_the_work(allocation: str) -> None:
    made = plan(VIT, SCORES, {"macs": 0.6, "keep": {"head": 2 / 3}}, allocation)
    heads = [len(made[axis.name]) for axis in VIT.units("head")]
    assert sum(heads) == 8
    assert predict_cost(VIT, made).macs <= 0.6 * FULL.macs
    assert sum(len(made[axis.name]) for axis in VIT.units("neuron")) < 4 * 96


def test_all_heads_of_a_layer_keep_their_best_dims() -> None:
    made = plan(VIT, SCORES, {"keep": {"qk_dim": 0.5}}, "uniform", units=["qk_dim"])
    for axis in VIT.units("qk_dim"):
        assert rows(made, axis) == {4}
        values = SCORES[axis.name]
        for head in range(3):
            mine = [*range(head * 8, head * 8 + 8)]
            best = sorted(mine, key=lambda unit: -values[unit])[:4]
            assert sorted(set(made[axis.name]) & {*mine}) == sorted(best)


def test_ends_stay_unless_they_are_given_up() -> None:
    values = {n: torch.ones_like(v) for n, v in SCORES.items()}
    values["blocks"] = torch.tensor([0.0, 3.0, 2.0, 1.0])
    scores = Scores(values, "kl", "mean", 1)
    assert plan(VIT, scores, {"keep": {"block": 0.5}}, units=["block"])["blocks"] == [0, 3]
    assert plan(VIT, scores, {"keep": {"block": 0.75}}, units=["block"])["blocks"] == [0, 1, 3]
    free = plan(VIT, scores, {"keep": {"block": 0.5}}, units=["block"], keep_ends=False)
    assert free["blocks"] == [1, 2]
    # branches of the first and the last block stay too
    branches = plan(VIT, scores, {"keep": {"attn_branch": 0.5}}, units=["attn_branch"])
    assert branches["attn_branches"] == [0, 3]


def test_patterns_protect_layers_and_what_holds_them() -> None:
    made = plan(VIT, SCORES, 0.5, protect=["blocks.1.attn.*"])
    assert len(made["blocks.1.attn.heads"]) == 3 and len(made["blocks.1.mlp.neurons"]) < 96
    deep = {"units": ["block", "neuron"], "keep_ends": False}
    assert 1 in plan(VIT, SCORES, 0.4, protect=["blocks.1.attn.heads"], **deep)["blocks"]
    only = plan(VIT, SCORES, 0.85, include=["blocks.2.*"])
    assert {n.split(".")[1] for n, axis in VIT.axes.items() if len(only[n]) < axis.size} == {"2"}
    blocks = plan(VIT, SCORES, 0.85, include=["blocks.2"], units=["block", "neuron"])
    assert blocks["blocks"] == [0, 1, 3] and len(blocks["blocks.1.mlp.neurons"]) == 96


def test_bounds_hold_from_both_sides() -> None:
    bounds = {"neuron": (0.5, None), "blocks.1.*": (None, 0.75), "blocks.2.mlp.neurons": (90, 92)}
    made = plan(VIT, SCORES, 0.7, bounds=bounds)
    counts = [len(made[axis.name]) for axis in VIT.units("neuron")]
    assert min(counts) >= 48 and counts[1] <= 72 and counts[2] in (90, 91, 92)
    assert len(made["blocks.1.attn.heads"]) <= 2


def test_every_stage_keeps_its_best_block() -> None:
    values = {n: torch.ones(axis.size) for n, axis in STAGES.axes.items()}
    values["blocks"] = torch.tensor([1.0, 2.0, 0.5, 3.0, 9.0, 4.0, 0.1])
    scores = Scores(values, "kl", "mean", 1)
    least = {"budget": {"keep": {"block": 4 / 7}}, "units": ["block"], "keep_ends": False}
    assert plan(STAGES, scores, **least)["blocks"] == [1, 2, 4, 6]
    with pytest.raises(
        InfeasibleBudget, match=r"share of 'block' from 0.571 to 1.000 .*every stage"
    ):
        plan(STAGES, scores, {"keep": {"block": 0.4}}, units=["block"], keep_ends=False)
    # nor do its branches all go, one kind after the other
    branches = ["attn_branch", "mlp_branch"]
    made = plan(STAGES, scores, {"keep": dict.fromkeys(branches, 5 / 7)}, units=branches)
    assert len(made.removed) == 4 and {*made["blocks"]} >= {0, 1, 2, 4, 6}


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (
            0.2,
            {"protect": ["blocks.[12].mlp.*"]},
            r"at least .*what binds most is protect, without",
        ),
        (0.2, {"bounds": {"neuron": (0.6, None)}}, "what binds most is bounds"),
        (0.2, {"min_units": {"neuron": 60}}, "what binds most is min_units"),
        (0.05, {"units": ["block"]}, "what binds most is (keep_ends|units)"),
        (0.2, {"include": ["blocks.0.*"]}, "what binds most is include"),
        ({"params": 0.02}, {}, r"at least [\d,]+ params \(0\.\d+ of the model\)"),
        (
            {"keep": {"neuron": 0.2}},
            {"bounds": {"neuron": (0.5, None)}},
            r"share of 'neuron' from 0.500 to 1.000 \(192 to 384 units\), got 0.2; what binds",
        ),
        (
            {"keep": {"neuron": 0.9}},
            {"bounds": {"neuron": (None, 0.5)}},
            "share of 'neuron' from 0.010 to 0.500",
        ),
        ({"macs": 0.3, "keep": {"head": 1.0, "neuron": 1.0}}, {}, "binds most is keep, without"),
        (0.2, {"min_units": 10**6}, "what binds most is min_units"),
        (0.2, {"bounds": {"neuron": (1.0, None)}}, "what binds most is bounds"),
        (0.5, {"units": ["head"]}, "what binds most is min_units"),
    ],
)
def test_what_cannot_be_met_is_named(budget: Any, options: dict, message: str) -> None:
    for allocation in names(FOLDER):
        with pytest.raises(InfeasibleBudget, match=message):
            plan(VIT, SCORES, budget, allocation, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": ["blocks.9.*"]}, "protect must match axes, branches or blocks .* 'blocks.9"),
        ({"include": ["block.0"]}, "include must match .* got 'block.0', which matches none"),
        ({"protect": "blocks.0.*"}, "protect must be a list of patterns, got 'blocks.0"),
        ({"protect": ["*"]}, "keep_ends must leave units to cut, got none of head, neuron"),
        ({"bounds": {"neuron": (0.9, 0.5)}}, "bounds must leave 'blocks.0.mlp.neurons' a number"),
        ({"bounds": {"neuron": 0.5}}, r"bounds of 'neuron' must be \(least, most\) .* got 0.5"),
        ({"bounds": {"neuron": (1.5, None)}}, "as shares between 0.0 and 1.0"),
        ({"bounds": {"embed": (0.5, None)}}, "bounds must be of axes that are cut, got 'embed'"),
        ({"bounds": {"neuron": (3, 5)}, "round_to": {"neuron": 8}}, "in steps of 8"),
        ({"units": ["neurons"]}, "units must be a list of kinds among"),
        ({"units": "neuron"}, "units must be a list of kinds among"),
        ({"units": []}, "units must be a list of kinds among"),
        ({"units": [["head"]]}, "units must be a list of kinds among"),
        ({"bounds": [1]}, "bounds must map unit kinds or patterns"),
        ({"bounds": {3: (0, 1)}}, "bounds must map unit kinds or patterns"),
        ({"units": ["block"], "protect": ["blocks.[12]"]}, "keep_ends must leave units to cut"),
    ],
)
def test_constraints_that_say_nothing_possible_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(VIT, SCORES, 0.5, **options)


def test_multiples_of_blocks_are_not_meant_by_one_number() -> None:
    made = plan(VIT, SCORES, 0.7, units=["block", "neuron"], round_to=8)
    assert len(made["blocks"]) < 4
    assert {len(made[axis.name]) % 8 for axis in VIT.units("neuron")} == {0}
    assert {*DEPTH_KINDS} < {*UNIT_KINDS}


def test_what_means_nothing_or_the_same_is_taken() -> None:
    half = plan(VIT, SCORES, 0.5)
    kinds = (kind for kind in ("head", "neuron"))
    assert plan(VIT, SCORES, 0.5, units=kinds, protect=None) == half  # pyright: ignore
    numbers: Any = {"neuron": (np.float32(0.5), np.int64(90))}
    made = plan(VIT, SCORES, 0.6, bounds=numbers, min_units={"head": np.int64(1)})  # pyright: ignore
    assert all(48 <= len(made[axis.name]) <= 90 for axis in VIT.units("neuron"))


def test_an_axis_of_branches_or_blocks_can_be_protected() -> None:
    free: Any = {"units": ["block", "neuron"], "keep_ends": False}
    assert len(plan(VIT, SCORES, 0.5, **free)["blocks"]) < 4
    assert len(plan(VIT, SCORES, 0.5, protect=["blocks"], **free)["blocks"]) == 4


def test_bounds_hold_by_any_name_of_tied_axes() -> None:
    model: Any = random_vit(depth=2)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    structure = describe(model)
    scores = random_scores(structure)
    for number in range(2):
        bounds = {f"blocks.{number}.mlp.neurons": (0.9, None)}
        made = plan(structure, scores, {"keep": {"neuron": 1.0}}, bounds=bounds)
        assert len(made["blocks.0.mlp.neurons"]) >= 87
        with pytest.raises(InfeasibleBudget, match=r"from 0.906 to 1.000"):
            plan(structure, scores, {"keep": {"neuron": 0.5}}, bounds=bounds)


def test_a_channel_stays_always() -> None:
    made = plan(VIT, SCORES, {"keep": {"embed": 0.0}}, units=["embed"], min_units=0)
    assert len(made["embed"]) == 1
